"""Caption files: valid after every event, whatever the text, and after a full disk."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import pytest

from hf_longctx.streaming import captions
from hf_longctx.streaming.captions import Captions, clock
from hf_longctx.streaming.events import Event
from hf_longctx.streaming.subtitles import Cue, read

NASTY = "one --> two\n\n\nthree & <b>four</b>\r\n\r\n\x07five\u2028six  "
EVENTS = [
    Event(0.0, 1.0, "Kick-off."),
    Event(1.0, 2.0, ""),
    Event(2.0, 3.0, NASTY, frames=2, tokens=9),
    Event(2.5, 2.5, "It is 0:0.", kind="answer"),
    Event(3.0, 4.0, "déjà vu 球"),
    Event(7199.5, 7200.0004, "Over."),
]


def write(folder: Path, events: list[Event] = EVENTS) -> tuple[Path, Path, Path]:
    paths = folder / "out.srt", folder / "out.vtt", folder / "new" / "out.jsonl"
    with Captions(*paths) as files:
        for event in events:
            files.add(event)
    return paths


def test_srt(tmp_path: Path) -> None:
    srt = write(tmp_path)[0].read_text(encoding="utf-8")
    assert srt == (
        "1\n00:00:00,000 --> 00:00:01,000\nKick-off.\n\n"
        "2\n00:00:02,000 --> 00:00:03,000\none -> two\nthree & <b>four</b>\nfive\nsix\n\n"
        "3\n00:00:02,500 --> 00:00:03,500\nIt is 0:0.\n\n"
        "4\n00:00:03,000 --> 00:00:04,000\ndéjà vu 球\n\n"
        "5\n01:59:59,500 --> 02:00:00,000\nOver.\n\n"
    )


def test_webvtt(tmp_path: Path) -> None:
    vtt = write(tmp_path)[1].read_text(encoding="utf-8")
    assert vtt.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:01.000\nKick-off.\n\n")
    assert "one --&gt; two\nthree &amp; &lt;b&gt;four&lt;/b&gt;\nfive\nsix\n\n" in vtt
    assert vtt.count("-->") == 5


def test_jsonl_has_every_event_as_it_was(tmp_path: Path) -> None:
    lines = write(tmp_path)[2].read_text(encoding="utf-8").splitlines()
    assert [Event(**json.loads(line)) for line in lines] == EVENTS


def test_all_formats_read_back(tmp_path: Path) -> None:
    srt, vtt, jsonl = write(tmp_path)
    plain = "one --> two\nthree & <b>four</b>\nfive\nsix"
    expected = [
        Cue(0, 1, "Kick-off."),
        Cue(2, 3, plain),
        Cue(2.5, 3.5, "It is 0:0."),
        Cue(3, 4, "déjà vu 球"),
        Cue(7199.5, 7200, "Over."),
    ]
    assert read(vtt) == expected
    assert read(srt) == [Cue(c.start, c.end, c.text.replace("-->", "->")) for c in expected]
    assert [cue.start for cue in read(jsonl)] == [cue.start for cue in expected]


def test_starts_never_go_back(tmp_path: Path) -> None:
    cues = read(write(tmp_path, [Event(5, 6, "a"), Event(4, 5, "b"), Event(5.5, 6, "c")])[1])
    assert cues == [Cue(5, 6, "a"), Cue(5, 6, "b"), Cue(5.5, 6, "c")]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "00:00:00.000"), (59.9996, "00:01:00.000"), (360000, "100:00:00.000")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds, ".") == text


def test_every_state_on_the_way_is_valid(tmp_path: Path) -> None:
    with Captions(tmp_path / "a.srt", tmp_path / "a.vtt", tmp_path / "a.jsonl") as files:
        for number, event in enumerate(EVENTS, 1):
            files.add(event)
            spoken = [event for event in EVENTS[:number] if event.text]
            assert len(read(tmp_path / "a.srt")) == len(read(tmp_path / "a.vtt")) == len(spoken)
            assert len((tmp_path / "a.jsonl").read_text().splitlines()) == number


class Disk:
    """`os.write` on a disk with so many bytes left: takes a part of what does not fit, then refuses."""

    def __init__(self, left: int) -> None:
        self.left, self.write = left, os.write

    def __call__(self, handle: int, data: bytes) -> int:
        if not self.left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self.write(handle, data[: self.left])
        self.left -= taken
        return taken


@pytest.mark.parametrize("left", [8, 9, 60, 100, 150, 200, 300, 777])
def test_a_full_disk_keeps_whole_captions(tmp_path: Path, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Captions(tmp_path / "a.srt", tmp_path / "a.vtt", tmp_path / "a.jsonl")
    monkeypatch.setattr(captions.os, "write", Disk(left))
    added = 0
    with pytest.raises(OSError, match=r"captions so far are kept") as caught:  # noqa: PT012
        for event in EVENTS * 9:
            files.add(event)
            added += 1
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    files.close()
    spoken = [event for event in (EVENTS * 9)[: added + 1] if event.text]
    for name, whole in (("a.srt", spoken), ("a.vtt", spoken), ("a.jsonl", (EVENTS * 9)[: added + 1])):
        text = (tmp_path / name).read_text(encoding="utf-8")
        count = len(text.splitlines()) if name == "a.jsonl" else len(re.findall("\n\n", text)) - (name == "a.vtt")
        assert len(whole) - 1 <= count <= len(whole)
        assert text.endswith("\n") or not text
        if name == "a.jsonl":
            assert [Event(**json.loads(line)) for line in text.splitlines()] == whole[:count]


def test_one_full_disk_does_not_cost_the_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Captions(tmp_path / "a.srt", tmp_path / "a.vtt", tmp_path / "a.jsonl")
    full, write = files.files[0]._file, os.write
    monkeypatch.setattr(captions.os, "write", lambda handle, data: (Disk(0) if handle == full else write)(handle, data))
    with pytest.raises(OSError, match=r"a\.srt"):
        files.add(EVENTS[0])
    assert (tmp_path / "a.srt").read_text() == ""
    assert len(read(tmp_path / "a.vtt")) == len(read(tmp_path / "a.jsonl")) == 1
    with pytest.raises(ValueError, match="was closed"):
        files.add(EVENTS[0])


def test_files_that_are_there_stay(tmp_path: Path) -> None:
    (tmp_path / "a.vtt").write_text("old")
    with pytest.raises(FileExistsError, match=r"a\.vtt"):
        Captions(tmp_path / "a.srt", tmp_path / "a.vtt")
    assert not (tmp_path / "a.srt").exists()
    assert (tmp_path / "a.vtt").read_text() == "old"
    Captions(tmp_path / "a.srt", tmp_path / "a.vtt", overwrite=True).close()
    assert (tmp_path / "a.vtt").read_text() == "WEBVTT\n\n"


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="twice"):
        Captions(tmp_path / "a", tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Captions(tmp_path / "file" / "a.srt")
    with Captions(tmp_path / "b.srt") as files, pytest.raises(ValueError, match="one stream"):
        files.add(Event(0, 1, "x", stream=1))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "srt, .vtt or .jsonl"),
        ("a.srt", b"hello", "captions with times"),
        ("a.srt", b"1\n00:00 --> never\nx\n", "hh:mm:ss"),
        ("a.jsonl", b'{"t": 1}\n', "line 1"),
        ("a.jsonl", b'{"t": NaN, "t_end": 2, "text": "x"}\n', "finite"),
        ("a.vtt", b"\xff\xfe", "UTF-8"),
    ],
)
def test_bad_caption_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_foreign_webvtt(tmp_path: Path) -> None:
    (tmp_path / "a.vtt").write_text(
        "\ufeffWEBVTT - a title\nKind: captions\n\nNOTE 00:01.000 --> 00:02.000\nno caption\n\n"
        "id 7\n00:01.500 --> 00:02.000 align:start\n<v Ann>Hi <c.red>there</c> &amp; bye\n",
        encoding="utf-8",
    )
    assert read(tmp_path / "a.vtt") == [Cue(1.5, 2, "Hi there & bye")]
