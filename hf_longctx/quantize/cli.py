"""The command `hf-longctx quantize`. Heavy imports are inside it, so that `--help` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..options import Device, Dtype, quiet


def quantize(
    model: Annotated[
        str | None,
        typer.Argument(help="Hub id, folder or .gguf file.", show_default="SmolLM2-135M-Instruct"),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = Path("out"),
    wbits: Annotated[int, typer.Option(help="Bits of a weight: 4 or 8.")] = 4,
    group_size: Annotated[
        int | None,
        typer.Option(help="Input channels of a group: 128, 64, 32; -1: none.", show_default="128; -1 with 8 bits"),
    ] = None,
    kv_bits: Annotated[int | None, typer.Option(help="What `patch` stores keys and values in: 4 or 8.")] = None,
    skip: Annotated[str, typer.Option(help="Linear layers that stay, by the ends of their names.")] = "",
    nearest: Annotated[bool, typer.Option("--nearest", help="Only round to the nearest: no texts, no steps.")] = False,
    calib: Annotated[
        Path | None, typer.Option(help="UTF-8 text file.", show_default="a text that ships with the package")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Texts to calibrate on.", show_default="128, or what the text has")
    ] = None,
    seqlen: Annotated[int, typer.Option(help="Tokens of each.")] = 1024,
    batch: Annotated[int, typer.Option(help="Texts that run together.", min=1)] = 4,
    rotate: Annotated[bool, typer.Option(help="Rotate the residual stream and values.")] = True,
    smooth_attention: Annotated[float, typer.Option(help="Exponent of SmoothAttention; 0: without.")] = 0.5,
    smooth: Annotated[float, typer.Option(help="Exponent of inputs in output smoothing; below 0: without.")] = 0.3,
    reorder: Annotated[bool, typer.Option(help="Sort channels into groups by size.")] = True,
    clip: Annotated[bool, typer.Option(help="Search how far each grid reaches.")] = True,
    gptq: Annotated[bool, typer.Option(help="Round by GPTQ; else to the nearest.")] = True,
    seed: Annotated[int, typer.Option(help="Draws the signs of the rotation.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the layers that are done.")] = False,
) -> None:
    """Quantize a model to QoQ (W4A8): a folder that `from_pretrained` loads once `hf_longctx` is imported.

    The published files of omniserve (`pytorch_model.bin` of a QServe model) are converted as they are.
    """
    from rich.console import Console

    console = Console()
    with console.status("Loading the libraries"):
        from ..evals import assets
        from ..evals import text as texts
        from ..options import names
        from ..weights.qoq.calibrate.recipe import Recipe
        from ..weights.qoq.config import QoQConfig
        from . import omniserve
        from . import run as room
        from .saving import save_model
    quiet()

    if model is not None and omniserve.found(Path(model)):
        save_model(*omniserve.read(Path(model)), out, None)
        console.print(f"Converted, as it is quantized already: {out}", soft_wrap=True)
        return
    config = QoQConfig(wbits, group_size, names(skip) or None, kv_bits)
    report: dict[str, Any] | None = None
    loaded, tokenizer = assets.load(model, dtype, "cpu", on_step=console.print)
    if nearest:
        room.round_all(loaded, config)
    else:
        recipe = Recipe(config, rotate, smooth_attention, smooth if smooth >= 0 else None, reorder, clip, gptq, seed)
        content = texts.read(calib)
        ids = room.samples(tokenizer, content, samples, seqlen)
        task = room.Task(len(ids), seqlen, batch, **texts.about(calib, content))
        place = assets.pick_device(device)
        report = room.run(loaded, ids, recipe, task, out, place, resume, console)
        console.print(room.table(report))
        console.print(room.unreached(report), end="\n" if room.unreached(report) else "", soft_wrap=True)
    save_model(loaded, tokenizer, out, report)
    console.print(f"Model: {out}", soft_wrap=True)
