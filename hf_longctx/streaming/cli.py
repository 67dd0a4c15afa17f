"""The command `hf-longctx stream`. Heavy imports are inside it, so that `--help` answers at once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..options import Device, Dtype, quiet

_Out = Annotated[Path | None, typer.Option(help="New file for captions.")]


def stream(
    video: Annotated[str, typer.Argument(help="Video file, folder of images, camera:0, or a URL (rtsp://...).")],
    model: Annotated[str, typer.Option("--model", "-m", help="Vision-language model: hub id or folder.")],
    fps: Annotated[float, typer.Option(help="Frames a second that the model sees.")] = 2.0,
    window_s: Annotated[float, typer.Option(help="Seconds that pictures are kept.")] = 16.0,
    query: Annotated[
        str, typer.Option(help="What the model is asked to do all the time.")
    ] = "Comment on what happens.",
    ask: Annotated[
        list[str] | None, typer.Option(help="SECONDS=QUESTION, asked at that time. May be given several times.")
    ] = None,
    text_sink: Annotated[int, typer.Option(help="First tokens of text that are kept.")] = 512,
    text_window: Annotated[int, typer.Option(help="Last tokens of text that are kept.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens that a round may say.")] = 20,
    srt: _Out = None,
    vtt: _Out = None,
    jsonl: _Out = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    when_full: Annotated[
        str | None,
        typer.Option(help="When frames come too fast: wait or drop.", show_default="drop for what is live, else wait"),
    ] = None,
    queue: Annotated[int, typer.Option(help="Frames that wait at most.")] = 8,
    stall_s: Annotated[
        float | None,
        typer.Option(help="Seconds without a frame that are an error.", show_default="10 for what is live, else 60"),
    ] = None,
    reconnect_s: Annotated[
        float, typer.Option(help="Seconds that a camera or URL which broke off is tried again.")
    ] = 0.0,
    max_pixels: Annotated[
        int | None, typer.Option(help="Scale larger frames down.", show_default="as they are")
    ] = None,
    start_s: Annotated[float, typer.Option(help="Seconds into a file to begin at; times count from there.")] = 0.0,
    stop_s: Annotated[float | None, typer.Option(help="Seconds into it to stop at.", show_default="its end")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Comment on a video or a live stream, for as long as it goes on, in bounded memory (StreamingVLM)."""
    from rich.console import Console

    console = Console(highlight=False)
    with console.status("Loading the libraries"):
        from ..evals import assets
        from .captions import Captions, check_places
        from .session import Session
        from .settings import Settings
        from .source import frames
        from .watch import Question, Summary, closing_lines, watch
    quiet()

    questions = [Question.read(each) for each in ask or []]
    knobs = {
        "when_full": when_full,
        "queue": queue,
        "stall_s": stall_s,
        "max_pixels": max_pixels,
        "reconnect_s": reconnect_s,
    }
    opened = partial(frames, video, fps, **knobs, start_s=start_s, stop_s=stop_s)  # type: ignore[arg-type]
    opened().close()  # what cannot be read is said before a model is loaded, and a live source is not left to run full
    Settings(query, max_new_tokens=new_tokens).check_window(window_s)
    check_places({"srt": srt, "vtt": vtt, "jsonl": jsonl}, overwrite)
    loaded, processor = assets.load_vision(model, dtype, device)
    session = Session(
        loaded,
        processor,
        query=query,
        window_s=window_s,
        text_sink=text_sink,
        text_window=text_window,
        max_new_tokens=new_tokens,
    )
    summary = Summary()
    with session:
        source, captions = opened(), Captions(srt, vtt, jsonl, overwrite=overwrite)
        try:
            watch(session, source, captions, questions, summary, console)
        finally:
            for line in closing_lines(summary, source, captions):
                console.print(line, style="dim", soft_wrap=True)
