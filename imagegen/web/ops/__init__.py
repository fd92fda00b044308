"""The routes of operation: health, metrics, stats, documentation."""
