"""History of the last 24 hours at steps of one minute, from all instances."""
