"""`/v1`: drop-in for the clients of OpenAI and Together (API.md section 3)."""
