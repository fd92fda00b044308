"""The routes of `/api`."""
