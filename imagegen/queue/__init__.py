"""The durable queue on a Redis stream: the only owner of Redis."""
