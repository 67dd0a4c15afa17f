"""Endless video: sources of frames, the session that reads them, and what it says. `hf_longctx.stream` in the docs."""

from __future__ import annotations

from .streaming.events import Event
from .streaming.frames import Frame
from .streaming.saved import load_session, save_session
from .streaming.session import Session
from .streaming.source import FrameSource, frames
from .streaming.stats import Stats

__all__ = ["Event", "Frame", "FrameSource", "Session", "Stats", "frames", "load_session", "save_session"]
