"""Who the clients are, what they may do, and what their images cost."""
