"""imagegen: paid image APIs as a durable, cheap, pleasant asynchronous API."""

__version__ = "0.5.0"
