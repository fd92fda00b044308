"""Owns the changed copy of a frozen dataclass, made several times for each task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataclasses import replace as changed
else:

    def changed(value: Any, /, **changes: Any) -> Any:
        """`dataclasses.replace` in a fifth of its time, for classes without slots and without `__post_init__`."""
        copy = object.__new__(type(value))
        copy.__dict__.update(value.__dict__)
        copy.__dict__.update(changes)
        return copy


__all__ = ["changed"]
