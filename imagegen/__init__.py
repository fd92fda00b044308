"""Service that turns paid image APIs into a durable asynchronous API."""

__version__ = "0.5.10"
