"""Frames of every kind of source: even times, nothing lost that was not counted, an end for every failure."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from hf_longctx.streaming.frames import Frame, fit, rgb
from hf_longctx.streaming.pictures import Counts, Picture
from hf_longctx.streaming.source import frames, ticks

from .films import film, grey, number


def shown(pictures: list[tuple[float, int]], fps: float, lasts: float = 0.0) -> list[tuple[float, int]]:
    """What `ticks` makes of numbered pictures."""
    source = (Picture(t, lasts, lambda n=n: torch.full((1, 1, 3), n, dtype=torch.uint8)) for t, n in pictures)
    return [(frame.t, int(frame.image[0, 0, 0])) for frame in ticks(source, fps, Counts())]


@pytest.mark.parametrize("fps", [0.5, 1, 2, 3, 7, 30])
@pytest.mark.parametrize("rate", [1, 2.5, 24, 29.97])
def test_a_frame_shows_the_last_picture_that_came(fps: float, rate: float) -> None:
    pictures = [(5 + n / rate, n) for n in range(40)]
    expected, k = [], 0
    while k / fps < 40 / rate - 1e-6:
        expected.append((k / fps, max(n for t, n in pictures if t - 5 <= k / fps + 1e-6)))
        k += 1
    assert shown(pictures, fps, 1 / rate) == expected


def test_a_clock_that_goes_back_goes_on() -> None:
    counts = Counts()
    pictures = [Picture(t, 0.5, lambda: torch.zeros(1, 1, 3)) for t in (0, 0.5, 1, 0, 0.5, 1)]
    assert [frame.t for frame in ticks(iter(pictures), 2, counts)] == [0, 0.5, 1, 1.5, 2, 2.5]
    assert counts.resets == 1


def test_video_file(tmp_path: Path) -> None:
    source = frames(film(tmp_path / "greys.mkv", 25, rate=10), fps=2)
    assert source.duration == pytest.approx(2.5)
    assert not source.live
    assert source.when_full == "wait"
    got = list(source)
    assert [frame.t for frame in got] == [0, 0.5, 1, 1.5, 2]
    assert [number(frame.image) for frame in got] == [0, 5, 10, 15, 20]
    assert got[0].image.shape == (48, 64, 3)
    assert got[0].image.dtype == torch.uint8
    assert (source.counts.read, source.counts.delivered, source.counts.dropped) == (25, 5, 0)


def test_a_part_of_a_video(tmp_path: Path) -> None:
    part = frames(film(tmp_path / "greys.mkv", 30, rate=10), fps=5, start_s=1, stop_s=2)
    assert [(frame.t, number(frame.image)) for frame in part] == [(0, 10), (0.2, 12), (0.4, 14), (0.6, 16), (0.8, 18)]


def test_large_pictures_are_scaled(tmp_path: Path) -> None:
    assert next(frames(film(tmp_path / "greys.mkv", 2), max_pixels=800)).image.shape == (24, 32, 3)
    assert rgb(grey(3), max_pixels=800).shape == (24, 32, 3)
    assert fit(48, 64, None) == fit(48, 64, 48 * 64) == (48, 64)


def test_folder_is_read_in_the_order_of_numbers(tmp_path: Path) -> None:
    for n in (1, 2, 10):
        Image.fromarray(grey(n)).save(tmp_path / f"{n}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    assert [(f.t, number(f.image)) for f in frames(tmp_path, fps=2)] == [(0, 1), (0.5, 2), (1, 10)]
    assert [(f.t, number(f.image)) for f in frames(tmp_path, fps=2, rate=1)][:3] == [(0, 1), (0.5, 1), (1, 2)]


@pytest.mark.parametrize("kind", ["numpy", "pil", "torch", "channels first", "grey", "alpha", "palette"])
def test_iterators_of_any_picture(kind: str) -> None:
    one = grey(4)
    item = {
        "numpy": one,
        "pil": Image.fromarray(one),
        "torch": torch.from_numpy(one),
        "channels first": torch.from_numpy(one).permute(2, 0, 1),
        "grey": one[:, :, 0],
        "alpha": np.concatenate([one, one[:, :, :1] * 0], axis=2),
        "palette": Image.fromarray(one[:, :, 0]).convert("P"),
    }[kind]
    got = list(frames([item, item], fps=4))
    assert [frame.t for frame in got] == [0, 0.25]
    assert all(torch.equal(frame.image, torch.from_numpy(one)) for frame in got)


def test_iterators_with_times() -> None:
    pairs = [(10.0, grey(1)), (10.6, grey(2)), (11.5, grey(3))]
    assert [(f.t, number(f.image)) for f in frames(iter(pairs), fps=2)] == [(0, 1), (0.5, 1), (1, 2), (1.5, 3)]
    again = frames((Frame(t, torch.from_numpy(image)) for t, image in pairs), fps=2)
    assert [(f.t, number(f.image)) for f in again] == [(0, 1), (0.5, 1), (1, 2), (1.5, 3)]
    assert again.counts.repeated == 1


def test_frames_may_change_size() -> None:
    assert [f.image.shape[0] for f in frames([grey(1), grey(1, 20, 30)], fps=1)] == [48, 20]


def test_wait_loses_nothing_and_reads_no_further_than_the_queue() -> None:
    read = []

    def pictures() -> Iterator[np.ndarray]:
        for n in range(20):
            read.append(n)
            yield grey(n)

    with frames(pictures(), queue=3) as source:
        time.sleep(0.2)
        assert len(read) == 4  # three wait, one is held by the thread
        assert [number(frame.image) for frame in source] == list(range(20))
    assert source.counts.dropped == 0


def test_drop_forgets_the_oldest_and_counts() -> None:
    all_read = threading.Event()

    def pictures() -> Iterator[np.ndarray]:
        yield from (grey(n) for n in range(20))
        all_read.set()

    source = frames(pictures(), queue=3, when_full="drop")
    assert all_read.wait(5)
    assert [number(frame.image) for frame in source] == [17, 18, 19]
    assert source.counts.dropped == 17
    assert source.counts.delivered == 3


def test_a_stall_is_an_error_and_ends_the_source() -> None:
    go = threading.Event()

    def pictures() -> Iterator[np.ndarray]:
        yield grey(1)
        go.wait(5)
        yield grey(2)

    source = frames(pictures(), stall_s=0.1)
    next(source)
    with pytest.raises(TimeoutError, match=r"within 0.1 s; got none since t = 0 s"):
        next(source)
    go.set()
    assert list(source) == []


def test_an_exception_comes_after_the_frames_before_it() -> None:
    def pictures() -> Iterator[np.ndarray]:
        yield from (grey(1), grey(2))
        raise KeyError("lens cap")

    source, got = frames(pictures()), []
    with pytest.raises(KeyError, match="lens cap"):
        got.extend(number(frame.image) for frame in source)
    source = frames(pictures())
    assert [number(next(source).image), number(next(source).image)] == [1, 2]
    with pytest.raises(KeyError, match="lens cap"):
        next(source)
    assert list(source) == []


def test_closing_ends_the_thread_and_forgetting_closes() -> None:
    for leave in (lambda source: source.close(), lambda source: None):
        source = frames((grey(n % 30) for n in range(1000)), queue=1)
        next(source)
        leave(source)
        del source
        for thread in threading.enumerate():
            if thread.name == "frames of the iterator":
                thread.join(5)
                assert not thread.is_alive()


def empty_file(path: Path) -> Path:
    path.touch()
    return path


def text_file(path: Path) -> Path:
    path.write_text("no video at all, " * 100)
    return path


def sound_file(path: Path) -> Path:
    import wave

    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16000))
    return path


def film_without_pictures(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        container.add_stream("ffv1", rate=10, width=64, height=48)
        container.start_encoding()
    return path


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: p / "none.mp4", FileNotFoundError, "none.mp4"),
        (lambda p: empty_file(p / "a.mp4"), ValueError, "FFmpeg cannot read|at least one frame"),
        (lambda p: text_file(p / "a.mp4"), ValueError, "FFmpeg cannot read"),
        (lambda p: sound_file(p / "a.wav"), ValueError, "no video stream"),
        (lambda p: film_without_pictures(p / "a.mkv"), ValueError, "FFmpeg cannot read|at least one frame"),
        (lambda p: p, ValueError, "expected images"),
        (lambda p: "camera:99", FileNotFoundError, "camera:99"),
        (lambda p: "rtsp://user:secret@127.0.0.1:9/x", ConnectionError, "rtsp://127.0.0.1:9/x"),
        (lambda p: 7, TypeError, "got int"),
    ],
)
def test_bad_sources(tmp_path: Path, make: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        frames(make(tmp_path))
    assert "secret" not in str(caught.value)


def test_no_pictures_at_all() -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        next(frames(iter(())))


@pytest.mark.parametrize("item", ["text", np.zeros((2, 2, 3)), np.zeros((2, 2, 5), np.uint8), np.zeros(3, np.uint8)])
def test_bad_pictures(item: object) -> None:
    with pytest.raises((TypeError, ValueError), match="frames: expected"):
        list(frames([item]))


@pytest.mark.parametrize(
    "knobs",
    [
        {"fps": 0},
        {"fps": -1},
        {"fps": float("nan")},
        {"stall_s": 0},
        {"rate": 0},
        {"queue": 0},
        {"max_pixels": 0},
        {"when_full": "block"},
        {"start_s": -1},
        {"start_s": 2, "stop_s": 2},
        {"start_s": 1},
        {"reconnect_s": -1},
        {"reconnect_s": 5},
    ],
)
def test_bad_arguments_touch_nothing(knobs: dict) -> None:
    source = iter([grey(1)])
    with pytest.raises(ValueError, match="expected"):
        frames(source, **knobs)
    next(source)


def test_a_damaged_film_gives_what_can_be_read(tmp_path: Path) -> None:
    path = film(tmp_path / "greys.mp4", 30)
    content = bytearray(path.read_bytes())
    middle = content.find(b"mdat") + 200
    content[middle : middle + 300] = bytes(300)
    path.write_bytes(content)
    got = list(frames(path, fps=2))
    assert [frame.t for frame in got] == [k / 2 for k in range(len(got))]
    assert len(got) >= 5


def test_a_video_over_http(tmp_path: Path) -> None:
    film(tmp_path / "greys.mkv", 20, rate=10)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        source = frames(f"{address}/greys.mkv", fps=2)
        assert [number(frame.image) for frame in source] == [0, 5, 10, 15]
        assert source.when_full == "wait"
        with pytest.raises(ConnectionError, match=r"none\.mkv; got: .*404"):
            frames(f"{address}/none.mkv")
        server.shutdown()


@pytest.mark.slow
def test_a_live_stream_drops_what_nobody_takes_and_stalls_when_it_ends() -> None:
    stop = threading.Event()

    def send() -> None:
        with av.open("udp://127.0.0.1:34567?pkt_size=1316", "w", format="mpegts") as container:
            stream = container.add_stream("mpeg2video", rate=25, width=64, height=48, pix_fmt="yuv420p")
            stream.codec_context.gop_size = 5
            while not stop.wait(0.04):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(grey(7), format="rgb24")))

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    try:
        source = frames("udp://127.0.0.1:34567", fps=5, queue=4, stall_s=5)
        assert source.live
        assert source.when_full == "drop"
        got = [next(source) for _ in range(8)]
        assert [round(later.t - sooner.t, 6) for sooner, later in pairwise(got)] == [0.2] * 7
        assert number(got[-1].image) == 7
        time.sleep(3)
        assert source.counts.dropped > 3
    finally:
        stop.set()
        sender.join()
    with pytest.raises(TimeoutError, match="within 5 s"):
        list(source)
