"""`/v1`: drop-in for the clients of OpenAI and Together (docs/api.md)."""
