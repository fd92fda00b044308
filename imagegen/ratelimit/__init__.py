"""Rate limits: their rules, and the stores that count."""
