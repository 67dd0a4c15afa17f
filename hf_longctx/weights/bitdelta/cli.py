"""The commands `hf-longctx delta ...`. Heavy imports are inside them, so that `--help` answers at once."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from ...options import Device, Dtype, Text, quiet

_Base = Annotated[str, typer.Option("--base", "-b", help="Folder or hub id of the base.")]
_Finetuned = Annotated[str, typer.Option("--finetuned", "-f", help="Folder or hub id of the fine-tune.")]
_Steps = Annotated[int, typer.Option(help="Of distillation.")]
_Train = Annotated[str, typer.Option(help="scales, or all that is not signs, which is then all stored.")]
_Rate = Annotated[float, typer.Option(help="Learning rate; at most a twentieth of the mean scale is used.")]
_Seed = Annotated[int, typer.Option(help="Draws pieces of the text.")]
_Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")]
_Dense = Annotated[
    str, typer.Option(help="Embeddings, head, norms, biases that differ: 16 (bits), int8 (tables), or native.")
]
_Revision = Annotated[str | None, typer.Option(help="Of the base on the hub.", show_default="the newest")]

app = typer.Typer(help="Fine-tunes as differences of one bit from their base.", no_args_is_help=True)


@app.callback()
def _delta() -> None:
    """Fine-tunes as differences of one bit from their base."""


@app.command()
def compress(
    base: _Base,
    finetuned: _Finetuned,
    out: _Out,
    bits: Annotated[int, typer.Option(help="Of each weight, 1 to 4.", min=1, max=4)] = 1,
    scales: Annotated[str, typer.Option(help="What shares a scale: matrix, row, or a number of inputs.")] = "matrix",
    dense: _Dense = "16",
    revision: _Revision = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="Distil the scales on this UTF-8 text afterwards.", show_default="none")
    ] = None,
    steps: _Steps = 200,
    train: _Train = "scales",
    rate: _Rate = 1e-4,
    seed: _Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Write the delta of a fine-tune. It holds one matrix of each model in memory; what was interrupted goes on."""
    console = _begin()
    from .bits import Grain
    from .compress import Settings, run
    from .distil import Lessons
    from .show import steps_of, table
    from .teach import run as teach

    settings, lessons = Settings(bits, Grain.of(scales), dense), Lessons(steps, rate=rate, train=train, seed=seed)
    with steps_of("tensors", console) as tell:
        sizes = run(base, finetuned, out, settings, revision, on_tensor=tell)
    console.print(table(sizes))
    if calibrate is not None:
        with steps_of("distillation", console) as tell:
            teach(out, finetuned, calibrate, lessons, device, dtype, lambda step, loss: tell(step, steps, loss))
    console.print(f"Delta: {out}", soft_wrap=True)


@app.command()
def distil(
    delta: Annotated[Path, typer.Argument(help="Folder of the delta.")],
    finetuned: _Finetuned,
    text: Text = None,
    steps: _Steps = 200,
    train: _Train = "scales",
    rate: _Rate = 1e-4,
    seed: _Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Teach the scales of a delta what its fine-tune says of a text: 4 pieces of 128 tokens a step."""
    console = _begin()
    from .distil import Lessons
    from .show import steps_of
    from .teach import run as teach

    lessons = Lessons(steps, rate=rate, train=train, seed=seed)
    with steps_of("distillation", console) as tell:
        teach(delta, finetuned, text, lessons, device, dtype, lambda step, loss: tell(step, steps, loss))
    console.print(f"Delta: {delta}", soft_wrap=True)


@app.command("export-lora")
def export_lora(
    delta: Annotated[Path, typer.Argument(help="Folder of the delta, or a published diff.pt.")],
    out: _Out,
    rank: Annotated[int, typer.Option(help="Of each matrix.")] = 64,
) -> None:
    """Write the nearest adapter of low rank in PEFT's form, and say how much of the delta it loses."""
    console = _begin()
    from .lora import export
    from .show import steps_of
    from .sources import open_delta

    with steps_of("matrices", console) as tell:
        exported = export(open_delta(delta), rank, out, tell)
    console.print(f"{exported}\nAdapter: {out}", soft_wrap=True, markup=False)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A published diff.pt.")],
    base: _Base,
    out: _Out,
    dense: _Dense = "16",
    revision: _Revision = None,
) -> None:
    """Turn a published diff.pt into safetensors beside its base; no code in it is run."""
    _begin()
    from .sources import convert as run

    run(source, base, out, dense, revision)
    typer.echo(f"Delta: {out}")


def _begin() -> Any:
    """The console, when the heavy libraries are there."""
    from rich.console import Console

    console = Console()
    with console.status("Loading the libraries"):
        import_module("transformers")
    quiet()
    return console
