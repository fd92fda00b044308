"""Owns the changed copy of a task or run."""

from msgspec.structs import replace as changed

__all__ = ["changed"]
