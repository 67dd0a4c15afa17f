"""A small RTSP server: a film over and over, as RTP packets that FFmpeg makes, inside the client's own connection."""

from __future__ import annotations

import base64
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import av

from .films import grey

_MPEG_VIDEO = 32  # the payload type of RFC 3551, which needs no more said in the description


@dataclass
class Server:
    """What a test may do to it.

    Attributes:
        url: to read from.
        sends: cleared, the connection stays and nothing comes.
        hangs_up: set, the connection ends, once.
        password: that a client must name, or None.
        asked: methods of the requests so far.
    """

    url: str
    password: str | None
    sends: threading.Event = field(default_factory=threading.Event)
    hangs_up: threading.Event = field(default_factory=threading.Event)
    stops: threading.Event = field(default_factory=threading.Event)
    asked: list[str] = field(default_factory=list)


@contextmanager
def serve(password: str | None = None) -> Iterator[Server]:
    """Inside the block there is one."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = Server(f"rtsp://127.0.0.1:{listening.getsockname()[1]}/camera", password)
        server.sends.set()
        listening.settimeout(0.1)
        thread = threading.Thread(target=_listen, args=(server, listening), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.stops.set()
            thread.join(10)


def _listen(server: Server, listening: socket.socket) -> None:
    """One client after the other."""
    while not server.stops.is_set():
        with suppress(TimeoutError), listening.accept()[0] as client, suppress(OSError):
            _answer(server, client)


def _answer(server: Server, client: socket.socket) -> None:
    """Requests of a client, until it wants to see."""
    file = client.makefile("rb")
    while True:
        method = file.readline().decode().split(" ")[0].strip()
        if not method:
            return
        head = dict(line.split(": ", 1) for line in iter(lambda: file.readline().decode().strip(), ""))
        server.asked.append(method)
        words = base64.b64encode(f"user:{server.password}".encode()).decode()
        if server.password is not None and head.get("Authorization") != f"Basic {words}":
            _say(client, head, "401 Unauthorized", 'WWW-Authenticate: Basic realm="camera"')
        elif method == "DESCRIBE":
            about = f"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=camera\r\nt=0 0\r\nm=video 0 RTP/AVP {_MPEG_VIDEO}\r\n"
            _say(client, head, "200 OK", "Content-Type: application/sdp", f"Content-Length: {len(about)}", body=about)
        elif method == "SETUP":
            _say(client, head, "200 OK", "Transport: RTP/AVP/TCP;unicast;interleaved=0-1", "Session: 1")
        elif method == "PLAY":
            _say(client, head, "200 OK", "Session: 1")
            _play(server, client)
            return
        else:
            _say(client, head, "200 OK", "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN")


def _say(client: socket.socket, head: dict[str, str], status: str, *lines: str, body: str = "") -> None:
    client.sendall("\r\n".join([f"RTSP/1.0 {status}", f"CSeq: {head['CSeq']}", *lines, "", body]).encode())


def _play(server: Server, client: socket.socket) -> None:
    """25 pictures a second, numbers 0 to 19 over and over, until somebody hangs up."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as packets:
        packets.bind(("127.0.0.1", 0))
        packets.setblocking(False)
        with av.open(f"rtp://127.0.0.1:{packets.getsockname()[1]}?pkt_size=1200", "w", format="rtp") as container:
            stream = container.add_stream("mpeg2video", rate=25, width=64, height=48, pix_fmt="yuv420p")
            stream.codec_context.gop_size = 5
            number = 0
            while not server.stops.is_set() and not server.hangs_up.is_set():
                if server.sends.is_set():
                    picture = av.VideoFrame.from_ndarray(grey(number % 20), format="rgb24")
                    container.mux(stream.encode(picture))
                    number += 1
                time.sleep(0.04)
                with suppress(BlockingIOError):
                    while True:
                        packet = packets.recv(2048)
                        client.sendall(b"$" + struct.pack("!BH", 0, len(packet)) + packet)
    server.hangs_up.clear()
