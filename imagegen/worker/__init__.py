"""The pool that runs tasks: attempts, pacing, side loops, deliveries."""
