from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_longctx.evals import text


def test_the_shipped_text_is_english_prose_without_line_breaks_inside_a_message() -> None:
    messages = text.shipped().split("\n\n")
    assert len(messages) == 4
    assert sum(len(m.split()) for m in messages) > 28_000
    assert all("\n" not in m and "  " not in m for m in messages)
    assert messages[0].endswith(".")


def test_read_takes_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Straße.\n", encoding="utf-8")
    assert text.read(path) == "Straße.\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        (b" \n\t", "white space"),
        (b"ab\xff", "0xff at offset 2"),
    ],
)
def test_read_refuses_what_is_no_text(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        text.read(path)


def test_read_refuses_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder"):
        text.read(tmp_path)


def test_stream_ids_never_repeats_a_text(tiny: tuple[Any, Any]) -> None:
    _, tokenizer = tiny
    words = "We hold these truths."
    ids = text.stream_ids(tokenizer, words)
    assert tokenizer.decode(ids) == words
    assert text.stream_ids(tokenizer, words, 3).tolist() == ids[:3].tolist()
    with pytest.raises(ValueError, match=rf"at least {len(ids) + 1} tokens; got {len(ids)}"):
        text.stream_ids(tokenizer, words, len(ids) + 1)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        text.stream_ids(tokenizer, words, 1)
