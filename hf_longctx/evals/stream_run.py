"""What `hf-longctx eval stream` does: the footage, its reference, the model, the run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..streaming import subtitles
from ..streaming.source import FrameSource, frames
from ..streaming.subtitles import Cue
from . import assets, clip, stream
from .stream_variants import Sizes


@dataclass(frozen=True)
class Asked:
    """The footage, and how captions are judged.

    Attributes:
        video: file; None is the clip.
        loop: over and over, with a sign on every second.
        seconds: of stream, at most.
        fps: frames a second.
        max_pixels: of each frame.
        reference: file of captions; None is the signs, where there are any.
        tolerance_s: seconds that a word may be early or late.
        judge: `package.module:function`, or None.
    """

    video: str | None
    loop: bool
    seconds: int
    fps: float
    max_pixels: int | None
    reference: Path | None
    tolerance_s: float
    judge: str | None

    def open(self, video: str) -> FrameSource:
        """The stream."""
        if not self.loop:
            return frames(video, self.fps, max_pixels=self.max_pixels, stop_s=self.seconds, when_full="wait")
        return frames(clip.looped(video, self.seconds, self.fps, self.max_pixels), self.fps)

    def captions(self) -> list[Cue]:
        """What should be said; nothing for a video of one's own without a reference."""
        if self.reference is not None:
            return subtitles.read(self.reference)
        return clip.reference(self.seconds) if self.loop else []


def run(
    model: str,
    dtype: str,
    device: str,
    variants: list[str],
    full_s: float,
    asked: Asked,
    sizes: Sizes,
    out: Path,
    console: Console,
) -> None:
    """All of the command; what is wrong with its arguments is said before a model is loaded."""
    stream.check(variants)
    judge = None if asked.judge is None else stream.load_judge(asked.judge)
    captions = asked.captions()
    video = str(clip.fetch(on_step=console.print)) if asked.video is None else asked.video
    with frames(video, asked.fps, max_pixels=asked.max_pixels):
        pass
    loaded, processor = assets.load_vision(model, dtype, device)
    about = {"video": Path(video).name, "loop": asked.loop, "fps": asked.fps, "max_pixels": asked.max_pixels}
    stream.run(
        loaded,
        processor,
        variants,
        lambda: asked.open(video),
        sizes,
        reference=captions,
        judge=judge,
        tolerance_s=asked.tolerance_s,
        limits_s={"full": full_s},
        about=about,
        out=out,
        console=console,
    )
    console.print(f"Files: {out / 'stream.jsonl'}, stream_summary.json, stream.png", soft_wrap=True)
