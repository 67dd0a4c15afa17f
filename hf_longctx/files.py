"""Files of this package: written in one step, and JSON read with a message for whatever is wrong."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def read_json(name: str, what: str, advice: str) -> Any:
    """What a file holds.

    Args:
        name: of the file.
        what: it should hold, for the message.
        advice: what to do about it, likewise.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not JSON.
    """
    if not os.path.isfile(name):
        raise FileNotFoundError(f"{what}: expected a JSON file; got {name}, which is none. {advice}.")
    with open(name, encoding="utf-8") as stream:
        try:
            return json.load(stream)
        except ValueError as error:  # also text that is not UTF-8
            raise ValueError(f"{name}: expected JSON; got {error}. {advice}.") from error


def number(value: Any) -> float:
    """A number of a file; raises TypeError for what only looks like one."""
    if type(value) not in (int, float):
        raise TypeError(f"{value!r} in place of a number")
    return float(value)


def whole(value: Any) -> int:
    """Likewise a whole number."""
    if type(value) is not int:
        raise TypeError(f"{value!r} in place of a whole number")
    return value


@contextmanager
def replacing(path: Path) -> Iterator[str]:
    """A file to write, which takes the place of `path` when the block has ended well; a failure leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(handle)
    try:
        yield scratch
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise
