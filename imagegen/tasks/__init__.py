"""Pure knowledge of tasks: what is asked, what state it is in, when it is tried again. No I/O."""
