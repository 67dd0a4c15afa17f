"""The commands `hf-longctx delta ...`. Heavy imports are inside them, so that `--help` answers at once."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from ...options import quiet

_Base = Annotated[str, typer.Option("--base", "-b", help="Folder or hub id of the base.")]
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
    finetuned: Annotated[str, typer.Option("--finetuned", "-f", help="Folder or hub id of the fine-tune.")],
    out: _Out,
    bits: Annotated[int, typer.Option(help="Of each weight, 1 to 4.", min=1, max=4)] = 1,
    scales: Annotated[str, typer.Option(help="What shares a scale: matrix, row, or a number of inputs.")] = "matrix",
    dense: _Dense = "16",
    revision: _Revision = None,
) -> None:
    """Write the delta of a fine-tune. It holds one matrix of each model in memory; what was interrupted goes on."""
    console = _begin()
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from .bits import Grain
    from .compress import Settings, run
    from .show import table

    settings = Settings(bits, Grain.of(scales), dense)
    columns = TextColumn("tensors"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as shown:
        task = shown.add_task("tensors")
        sizes = run(
            base,
            finetuned,
            out,
            settings,
            revision,
            on_tensor=lambda done, total: shown.update(task, completed=done, total=total),
        )
    console.print(table(sizes))
    console.print(f"Delta: {out}", soft_wrap=True)


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
