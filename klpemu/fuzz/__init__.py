"""Searching for sequences of operations after which something does not hold."""

__all__: list[str] = []
