"""`hf-longctx tune`: measure a model once, and keep what a method then uses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options import Device, Dtype, Model, Text, quiet

app = typer.Typer(help="Measure a model once, for methods that then fit it better.", no_args_is_help=True)


@app.callback()
def _tune() -> None:
    """Measure a model once, for methods that then fit it better."""


@app.command()
def crossover(
    model: Model = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The JSON file to write.", show_default="where auto looks, in the cache"),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens in a prompt, with commas between; 1k is 1024.")] = "4k,8k,16k",
    budget: Annotated[int, typer.Option(help="quest: tokens that a decode step reads.")] = 4096,
    text: Text = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Measure from which length on quest decodes, and xattention reads prompts, faster than dense on this device.

    One prompt at a time, the median of 3. Auto() then uses each from there on, or Auto(crossover=FILE) does.
    """
    from rich.console import Console

    console = Console()
    with console.status("Loading the libraries"):
        from ..evals import assets
        from ..evals import text as corpus
        from ..evals.grammar import lengths as read_lengths
        from . import measure
    quiet()

    content = corpus.read(text)
    sizes, about = tuple(read_lengths(lengths)), corpus.about(text, content)
    settings = measure.Settings(assets.display_name(model), sizes, budget, **about)
    loaded, tokenizer = assets.load(model, dtype, device, on_step=console.print)
    measure.run(loaded, tokenizer, content, settings, out, console)


@app.command()
def xattention(
    model: Model = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The JSON file to write.")] = Path("taus.json"),
    stride: Annotated[int, typer.Option(help="Tokens of a tile whose antidiagonal is summed.")] = 8,
    block: Annotated[int, typer.Option(help="Tokens of a block.")] = 128,
    method: Annotated[
        str, typer.Option(help="dp: fewest blocks over all heads; heuristic: each head for itself.")
    ] = "dp",
    text: Text = None,
    length: Annotated[str, typer.Option(help="Tokens of a sample, such as 4096 or 4k; whole blocks.")] = "4k",
    samples: Annotated[int, typer.Option(help="Samples, one after the other in the text.")] = 4,
    coverage: Annotated[float, typer.Option(help="Share of the true attention that is to be read.")] = 0.9,
    steps: Annotated[
        int, typer.Option(help="dp: shares into which what may be missed is divided; many more than heads.")
    ] = 10_000,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Find how much of the scored attention each query head must read, and write it for XAttention(tau=FILE)."""
    from rich.console import Console

    console = Console()
    with console.status("Loading the libraries"):
        from ..evals import assets
        from ..evals import text as corpus
        from ..evals.grammar import lengths
        from . import run
    quiet()

    content = corpus.read(text)
    settings = run.Settings(
        model=assets.display_name(model),
        method=method,
        stride=stride,
        block=block,
        length=lengths(length)[0],
        samples=samples,
        coverage=coverage,
        steps=steps,
        text=text.name if text else "shipped",
        text_sha256=corpus.digest(content),
    )
    loaded, tokenizer = assets.load(model, dtype, device, on_step=console.print)
    run.run(loaded, run.texts(tokenizer, content, settings.length, samples), settings, out, console)
