"""`hf-longctx tune`: measure a model once, and keep what a method then uses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Measure a model once, for methods that then fit it better.", no_args_is_help=True)


@app.callback()
def _tune() -> None:
    """Measure a model once, for methods that then fit it better."""


@app.command()
def xattention(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Hub id, folder or .gguf file.", show_default="SmolLM2-135M-Instruct"),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The JSON file to write.")] = Path("taus.json"),
    stride: Annotated[int, typer.Option(help="Tokens of a tile whose antidiagonal is summed.")] = 8,
    block: Annotated[int, typer.Option(help="Tokens of a block.")] = 128,
    method: Annotated[
        str, typer.Option(help="dp: fewest blocks over all heads; heuristic: each head for itself.")
    ] = "dp",
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text file.", show_default="a text that ships with the package")
    ] = None,
    length: Annotated[str, typer.Option(help="Tokens of a sample, such as 4096 or 4k; whole blocks.")] = "4k",
    samples: Annotated[int, typer.Option(help="Samples, one after the other in the text.")] = 4,
    coverage: Annotated[float, typer.Option(help="Share of the true attention that is to be read.")] = 0.9,
    steps: Annotated[
        int, typer.Option(help="dp: shares into which what may be missed is divided; many more than heads.")
    ] = 10_000,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N. auto takes CUDA if there is any.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's own), float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Find how much of the scored attention each query head must read, and write it for XAttention(tau=FILE)."""
    from rich.console import Console

    console = Console()
    with console.status("Loading the libraries"):
        from ..evals import assets
        from ..evals import text as corpus
        from ..evals.ppl_run import digest
        from . import run
    assets.quiet()

    content = corpus.read(text)
    settings = run.Settings(
        model=assets.display_name(model),
        method=method,
        stride=stride,
        block=block,
        length=run.tokens(length),
        samples=samples,
        coverage=coverage,
        steps=steps,
        text=text.name if text else "shipped",
        text_sha256=digest(content),
    )
    loaded, tokenizer = assets.load(model, dtype, device, on_step=console.print)
    run.run(loaded, run.texts(tokenizer, content, settings.length, samples), settings, out, console)
