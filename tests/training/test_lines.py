"""The published format: read as it is written, line by line, and refused where it is another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_longctx.training.chunks import Asked, Chunk, Word
from hf_longctx.training.lines import Lines, Rows, from_line, seeks_of, write

CHUNKS = [
    Chunk("a.mp4", 0.0, 24.0, "Commentate.", "", (Word(0.5, 0.9, "Kick"), Word(1.0, 1.2, "off"))),
    Chunk("é/b.mp4", 12.0, 36.0, "Commentate.", "Kick off\nnow", (), (Asked("q", 13.0, "Who?", "Nobody."),)),
    Chunk("c.mp4", 24.0, 48.0, "Say.", "x", (Word(47.9, 48.3, "球"),)),
]

PUBLISHED = [
    {
        "role": "user",
        "content": [
            {"type": "video", "video": "a.mp4", "video_start": 0.0, "video_end": 24.0},
            {"type": "text", "text": "Commentate.", "previous": ""},
        ],
    },
    {
        "role": "assistant",
        "content": [{"type": "text_stream", "text_stream": [[0.5, 0.9, "Kick"], [1.0, 1.2, "off"]]}],
    },
]


def test_the_published_line(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", CHUNKS[:1])
    assert json.loads((tmp_path / "train.jsonl").read_text()) == PUBLISHED
    assert json.loads((tmp_path / "train_seeks.jsonl").read_text()) == [0]
    assert from_line(PUBLISHED) == CHUNKS[0]


def test_lines_are_read_at_their_places(tmp_path: Path) -> None:
    assert write(tmp_path / "train.jsonl", iter(CHUNKS)) == 3
    raw = (tmp_path / "train.jsonl").read_bytes()
    offsets = json.loads(seeks_of(tmp_path / "train.jsonl").read_text())
    assert offsets == [0, *(n + 1 for n, byte in enumerate(raw[:-1]) if byte == 10)]
    lines = Lines(tmp_path / "train.jsonl")
    assert [lines[2], lines[-3], lines[1]] == [CHUNKS[2], CHUNKS[0], CHUNKS[1]]
    assert list(lines) == lines[:] == CHUNKS
    assert [Chunk.from_row(row).words for row in Rows(lines)] == [chunk.words for chunk in CHUNKS]
    seeks_of(tmp_path / "train.jsonl").unlink()
    assert list(Lines(tmp_path / "train.jsonl")) == CHUNKS


def test_no_lines(tmp_path: Path) -> None:
    assert write(tmp_path / "train.jsonl", []) == 0
    assert list(Lines(tmp_path / "train.jsonl")) == []


def test_a_failing_write_leaves_the_old_files(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", CHUNKS)
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "train.jsonl", (1 // 0 for _ in "x"))  # type: ignore[misc]
    assert list(Lines(tmp_path / "train.jsonl")) == CHUNKS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.jsonl", "train_seeks.jsonl"]


@pytest.mark.parametrize("places", ["no json", "{}", "[0.5]", "[5]", "[0, 9, 9]", "[0, 9999999]", "[]", '["0"]'])
def test_places_that_do_not_fit(tmp_path: Path, places: str) -> None:
    write(tmp_path / "train.jsonl", CHUNKS)
    seeks_of(tmp_path / "train.jsonl").write_text(places)
    with pytest.raises(ValueError, match=r"train_seeks\.jsonl"):
        Lines(tmp_path / "train.jsonl")


def test_places_of_another_file_are_noticed_when_read(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", CHUNKS)
    places = json.loads(seeks_of(tmp_path / "train.jsonl").read_text())
    for other in ([0, places[2]], [0, places[1] + 3, places[2]]):
        seeks_of(tmp_path / "train.jsonl").write_text(json.dumps(other))
        with pytest.raises(ValueError, match=r"Delete train_seeks|line 1"):
            list(Lines(tmp_path / "train.jsonl"))


@pytest.mark.parametrize(
    "change",
    [
        lambda line: line.pop(),
        lambda line: line[0]["content"].pop(),
        lambda line: line[0]["content"][0].update(video_start="0"),
        lambda line: line[0]["content"][0].update(video=7),
        lambda line: line[0]["content"][0].update(video_end=0),
        lambda line: line[1]["content"][0].update(text_stream=[[1, 2]]),
        lambda line: line[1]["content"][0].update(text_stream=[[99, 100, "late"]]),
    ],
)
def test_a_line_that_is_none_is_named(tmp_path: Path, change: object) -> None:
    line = json.loads(json.dumps(PUBLISHED))
    change(line)
    (tmp_path / "train.jsonl").write_text(json.dumps(PUBLISHED) + "\n" + json.dumps(line) + "\n")
    lines = Lines(tmp_path / "train.jsonl")
    assert lines[0] == CHUNKS[0]
    with pytest.raises(ValueError, match=r"line 2 of .*train\.jsonl"):
        lines[1]


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        Lines(tmp_path / "none.jsonl")
    write(tmp_path / "train.jsonl", CHUNKS)
    with pytest.raises(IndexError):
        Lines(tmp_path / "train.jsonl")[3]
