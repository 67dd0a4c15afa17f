"""The command `hf-longctx`. Heavy imports are inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Any

import typer

from .bench.cli import app as bench
from .evals.cli import app as evals
from .heads.cli import app as heads
from .options import Device, Dtype, Model, Text, names, quiet
from .quantize.cli import quantize
from .streaming.cli import stream
from .tune.cli import app as tune
from .weights.bitdelta.cli import app as delta

_EPILOG = "Set HF_LONGCTX_DEBUG=1 to see the traceback of an error."

app = typer.Typer(
    help="Run long contexts on loaded Hugging Face transformers models in bounded memory.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(evals, name="eval")
app.add_typer(bench, name="bench")
app.add_typer(tune, name="tune")
app.add_typer(heads, name="heads")
app.add_typer(delta, name="delta")
app.command()(quantize)
app.command()(stream)


def _version(asked: bool) -> None:
    if asked:
        from . import __version__

        typer.echo(f"hf_longctx {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")] = False) -> None:
    """Show versions, devices, and which backend each operation can run on, with the reason of every no."""
    from .doctor import collect, render

    found = collect()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    from rich.console import Console

    console = Console()
    for part in render(found):
        console.print(part)


@app.command()
def plan(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Hub id, folder, config.json or .gguf.", show_default="SmolLM2-135M-Instruct"
        ),
    ] = None,
    context: Annotated[str, typer.Option(help="Tokens of prompt and answer; 128k is 131072.")] = "128k",
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    memory: Annotated[
        str | None, typer.Option(help="Of the device that is meant, such as 24GiB.", show_default="what is free here")
    ] = None,
    dtype: Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")] = False,
) -> None:
    """Tell from a model's configuration alone what every method would hold, whether it fits, and which to take."""
    import torch

    from .configs import build
    from .evals.grammar import lengths
    from .outlook import plan as look_ahead

    (tokens, *more) = lengths(context)
    if more:
        raise ValueError(f"--context: expected one length such as 128k; got '{context}'. Run it for each of them.")
    found = look_ahead(build(model, dtype, torch.device("meta")), tokens, batch, memory)
    typer.echo(json.dumps(found.to_json(), indent=1) if as_json else str(found))


@app.command()
def demo(
    model: Model = None,
    length: Annotated[int, typer.Option(help="Tokens in the prompt.")] = 2048,
    methods: Annotated[
        str | None, typer.Option(help="Comma-separated names.", show_default="all that the model supports")
    ] = None,
    depth: Annotated[float, typer.Option(help="Where the pass key hides: 0 is the start, 1 the end.")] = 0.5,
    sinks: Annotated[int, typer.Option(help="streaming_llm: first tokens that stay.")] = 4,
    window: Annotated[int, typer.Option(help="streaming_llm: last tokens that stay.")] = 508,
    sparsity: Annotated[float, typer.Option(help="duo_attention: share of the KV heads that stream.")] = 0.5,
    pattern: Annotated[
        str | None,
        typer.Option(help="duo_attention: folder or name of a head pattern.", show_default="the model's own"),
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=2)] = 12,
    seed: Annotated[int, typer.Option(help="Draws the pass key and the place in the text.")] = 0,
    text: Text = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Hide a pass key in a real text, ask for it under every method, and show what each one held in memory."""
    from rich.console import Console

    console = Console()
    with console.status("Loading the libraries"):
        from .demo import ask, choose, table
        from .evals import assets, passkey
        from .evals import text as texts
    quiet()

    haystack = texts.read(text)
    loaded, tokenizer = assets.load(model, dtype, device, on_step=console.print)
    trial = passkey.build(tokenizer, haystack, length, depth, seed)
    knobs: dict[str, dict[str, Any]] = {
        "streaming_llm": {"sinks": sinks, "window": window},
        "duo_attention": {"sparsity": sparsity, "pattern": pattern},
    }
    chosen, left_out = choose(loaded, names(methods) if methods else None, knobs)
    for line in left_out:
        console.print(line, style="yellow", markup=False)
    outcomes = [ask(loaded, tokenizer, trial, name, knobs.get(name, {}), new_tokens, console) for name in chosen]
    console.print(table(outcomes, trial))


def main() -> None:
    """Run the command; a mistake of the caller or of the surroundings is one line and exit code 1."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, TypeError, NotImplementedError, OSError, MemoryError, RuntimeError) as error:
        if os.environ.get("HF_LONGCTX_DEBUG"):
            raise
        typer.secho(f"error: {' '.join(str(error).split()) or type(error).__name__}", fg="red", err=True)
        sys.exit(1)
