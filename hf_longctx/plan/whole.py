"""Sizes are whole numbers; what only looks like one is refused where it is given."""

from __future__ import annotations


def require_whole(where: str, least: int = 1, **sizes: object) -> None:
    """Refuse a size that is no whole number (a float or a bool is none), or less than it may be.

    Args:
        where: for the message.
        least: the least that each may be.
        **sizes: by name.

    Raises:
        ValueError: names the first that is refused.
    """
    for name, size in sizes.items():
        if type(size) is not int or size < least:
            raise ValueError(
                f"{where}: expected {name} as a whole number >= {least}; got {size!r}. Give {name}={least} or more."
            )
