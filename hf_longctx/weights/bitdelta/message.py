"""The one form of an error of this room."""

from __future__ import annotations


def say(where: str, expected: object, got: object, advice: str) -> str:
    """What was expected, what came, and what to do."""
    return f"{where}: expected {expected}; got {got}. {advice}."
