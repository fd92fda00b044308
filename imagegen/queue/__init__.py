"""Durable queue of tasks on a Redis stream."""
