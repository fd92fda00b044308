"""The client of Redis: connections, batches, addresses, and the embedded server."""
