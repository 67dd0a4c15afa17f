"""Cameras and network streams: a real RTSP server, connections that break off, devices that are not there."""

from __future__ import annotations

import io
import json
import socket
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import pytest

from hf_longctx.streaming import opening, video
from hf_longctx.streaming.source import frames
from hf_longctx.testing.vision import tiny_qwen2_5_vl

from ..operators import needs_torchvision
from .films import grey, number
from .rtsp import serve


def test_an_rtsp_stream_is_read_as_it_comes() -> None:
    with serve() as server, frames(server.url, fps=5, stall_s=5) as source:
        got = [next(source) for _ in range(6)]
        assert server.asked == ["OPTIONS", "DESCRIBE", "SETUP", "PLAY"]
        assert (source.live, source.when_full, source.duration) == (True, "drop", None)
    assert [frame.t for frame in got] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert [(later - sooner) % 20 for sooner, later in pairwise(number(frame.image) for frame in got)] == [5] * 5


def test_a_password_is_used_and_never_shown() -> None:
    with serve("secret") as server:
        named = server.url.replace("//", "//user:secret@")
        with frames(named, stall_s=5) as source:
            assert next(source).t == 0
            assert source.name == server.url
        for url in (server.url, server.url.replace("//", "//user:wrong-secret@")):
            with pytest.raises(ConnectionError, match="401 Unauthorized") as caught:
                frames(url, stall_s=5)
            assert "secret" not in str(caught.value)


def test_a_connection_that_says_nothing_more_is_a_stall() -> None:
    with serve() as server, frames(server.url, fps=5, stall_s=0.5) as source:
        next(source)
        server.sends.clear()
        with pytest.raises(TimeoutError, match=r"within 0.5 s; got none since t = "):
            list(source)


def test_a_connection_that_ends_is_the_end_or_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_PAUSE_S", 0.05)
    with serve() as server:
        source = frames(server.url, fps=5, stall_s=5)
        next(source)
        server.hangs_up.set()
        assert len(list(source)) < 5
        with frames(server.url, fps=5, stall_s=5, reconnect_s=5) as source:
            before = [next(source) for _ in range(3)]
            server.hangs_up.set()
            got = [*before, *(next(source) for _ in range(8))]
            assert source.counts.reconnects == 1
    assert [frame.t for frame in got] == pytest.approx([n / 5 for n in range(11)])
    assert server.asked.count("PLAY") == 3


def test_a_source_that_does_not_come_back_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_PAUSE_S", 0.05)
    with serve() as server:
        source = frames(server.url, fps=5, stall_s=5, reconnect_s=0.3)
        next(source)
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=r"expected to read rtsp://127.0.0.1:\d+/camera; got: Connection refused"):
        list(source)
    assert time.monotonic() - began < 4


def test_a_stream_over_tcp_ends_with_its_connection() -> None:
    made = io.BytesIO()
    with av.open(made, "w", format="mpegts") as container:
        stream = container.add_stream("mpeg2video", rate=10, width=64, height=48, pix_fmt="yuv420p")
        stream.codec_context.gop_size = 5
        for n in range(30):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey(n), format="rgb24")))
        container.mux(stream.encode())

    def send() -> None:
        with listening.accept()[0] as client:
            client.sendall(made.getvalue())

    with socket.create_server(("127.0.0.1", 0)) as listening:
        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        source = frames(f"tcp://127.0.0.1:{listening.getsockname()[1]}", fps=2, stall_s=5, when_full="wait")
        assert source.live
        assert [(frame.t, number(frame.image)) for frame in source] == [(n / 2, 5 * n) for n in range(6)]
        sender.join(5)


@pytest.mark.parametrize(
    ("system", "name", "where", "options"),
    [
        ("linux", "camera:0", "/dev/video0", {"format": "v4l2"}),
        ("linux", "camera:/dev/null", "/dev/null", {"format": "v4l2"}),
        ("darwin", "camera:1", "1", {"format": "avfoundation", "options": {"framerate": "30"}}),
        ("win32", "camera:HD Cam", "video=HD Cam", {"format": "dshow"}),
    ],
)
def test_a_camera_is_asked_for_as_the_system_has_it(
    monkeypatch: pytest.MonkeyPatch, system: str, name: str, where: str, options: dict[str, Any]
) -> None:
    asked: list[tuple[Any, ...]] = []

    def opened(*given: Any, timeout: float, **more: Any) -> Any:
        asked.append((*given, timeout, more))
        raise av.error.FileNotFoundError(2, "No such file or directory", where)

    monkeypatch.setattr(video.sys, "platform", system)
    monkeypatch.setattr(video.Path, "exists", lambda path: True)
    monkeypatch.setattr(av, "open", opened)
    with pytest.raises(ConnectionError, match=f"expected to read {name}; got: No such file"):
        frames(name, stall_s=3)
    assert asked == [(where, 3, options)]


def test_what_is_no_camera_is_refused() -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a camera at /dev/video77 for camera:77; .* There is: "):
        frames("camera:77")
    with pytest.raises((ConnectionError, ValueError), match="camera:/dev/null"):
        frames("camera:/dev/null", stall_s=1)


@needs_torchvision
def test_the_command_comments_on_a_live_stream_until_it_ends(call: Any, tmp_path: Path) -> None:
    model, processor = tiny_qwen2_5_vl()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with serve() as server:

        def hang_up() -> None:
            while server.asked.count("PLAY") < 2:  # the first only sees whether there is something
                time.sleep(0.05)
            time.sleep(3)
            server.hangs_up.set()

        ends = threading.Thread(target=hang_up, daemon=True)
        ends.start()
        out = tmp_path / "out.jsonl"
        code, said, err = call("stream", server.url, "-m", str(tmp_path), "--new-tokens=2", f"--jsonl={out}")
    assert code == 0, err
    events = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(events) >= 2
    assert [event["round"] for event in events] == list(range(len(events)))
    assert "frames" in said
