"""Tasks as pure values: the request, the state, the retry. No I/O."""
