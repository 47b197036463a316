"""Errors that name cause and cure."""

from __future__ import annotations


def require(good: bool, name: str, value, needed: str) -> None:
    """A ValueError that names a setting, its value and what it must be, unless `good`."""
    if not good:
        raise ValueError(f"{name} is {value!r}; it must be {needed}")
