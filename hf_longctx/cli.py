"""The command `hf-longctx`. Heavy imports are inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .tune.cli import app as tune

_EPILOG = "Set HF_LONGCTX_DEBUG=1 to see the traceback of an error."
_MODEL = typer.Option("--model", "-m", help="Hub id, folder or .gguf file.", show_default="SmolLM2-135M-Instruct")
_TEXT = typer.Option("--text", help="UTF-8 text file.", show_default="a text that ships with the package")
_DEVICE = typer.Option(help="auto, cpu, cuda or cuda:N. auto takes CUDA if there is any.")
_DTYPE = typer.Option(help="auto (the checkpoint's own), float32, bfloat16 or float16.")

app = typer.Typer(
    help="Run long contexts on loaded Hugging Face transformers models in bounded memory.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
evals = typer.Typer(help="Measure a model under several methods.", no_args_is_help=True)
app.add_typer(evals, name="eval")
app.add_typer(tune, name="tune")


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


@evals.callback()
def _evals() -> None:
    """Measure a model under several methods."""


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
def demo(
    model: Annotated[str | None, _MODEL] = None,
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
    text: Annotated[Path | None, _TEXT] = None,
    device: Annotated[str, _DEVICE] = "auto",
    dtype: Annotated[str, _DTYPE] = "auto",
) -> None:
    """Hide a pass key in a real text, ask for it under every method, and show what each one held in memory."""
    from rich.console import Console

    console = Console()
    with console.status("Loading the libraries"):
        from .demo import ask, choose, table
        from .evals import assets, passkey
        from .evals import text as texts
    assets.quiet()

    haystack = texts.read(text)
    loaded, tokenizer = assets.load(model, dtype, device, on_step=console.print)
    trial = passkey.build(tokenizer, haystack, length, depth, seed)
    knobs: dict[str, dict[str, Any]] = {
        "streaming_llm": {"sinks": sinks, "window": window},
        "duo_attention": {"sparsity": sparsity, "pattern": pattern},
    }
    names, left_out = choose(loaded, _names(methods) if methods else None, knobs)
    for line in left_out:
        console.print(line, style="yellow", markup=False)
    outcomes = [ask(loaded, tokenizer, trial, name, knobs.get(name, {}), new_tokens, console) for name in names]
    console.print(table(outcomes, trial))


@evals.command()
def ppl(
    model: Annotated[str | None, _MODEL] = None,
    text: Annotated[Path | None, _TEXT] = None,
    methods: Annotated[
        str, typer.Option(help="Comma-separated names. 'window' is streaming_llm without sinks, of the same size.")
    ] = "dense,window,streaming_llm",
    sinks: Annotated[int, typer.Option(help="streaming_llm: first tokens that stay.")] = 4,
    window: Annotated[int, typer.Option(help="streaming_llm: last tokens that stay.")] = 1020,
    sparsity: Annotated[float, typer.Option(help="duo_attention: share of the KV heads that stream.")] = 0.5,
    tokens: Annotated[int | None, typer.Option(help="Tokens of the text.", show_default="all")] = None,
    dense_tokens: Annotated[
        int | None, typer.Option(help="Stop dense and duo_attention, whose cache grows, here.", show_default="tokens")
    ] = None,
    chunk: Annotated[int, typer.Option(help="Tokens per call: changes the time, not the result.")] = 512,
    block: Annotated[int, typer.Option(help="Positions per row of the table; a multiple of the chunk.")] = 4096,
    device: Annotated[str, _DEVICE] = "auto",
    dtype: Annotated[str, _DTYPE] = "auto",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for ppl.json and ppl.png.")] = Path("out"),
    resume: Annotated[
        bool, typer.Option(help="Keep the methods that ppl.json already has for these settings.")
    ] = False,
) -> None:
    """Perplexity along one long text, per block of positions, for several methods in one run.

    Writes ppl.json after every method, and ppl.png if matplotlib is installed (extra [plot]).
    """
    from rich.console import Console

    console = Console()
    with console.status("Loading the libraries"):
        from .evals import assets, ppl_run
        from .evals import text as texts
        from .evals.ppl import variants
    assets.quiet()

    chosen = variants(_names(methods), sinks, window, dense_tokens, sparsity)
    content = texts.read(text)
    loaded, tokenizer = assets.load(model, dtype, device, on_step=console.print)
    settings = ppl_run.Settings(
        model=assets.display_name(model),
        text=text.name if text else "shipped",
        text_sha256=ppl_run.digest(content),
        tokens=len(ids := texts.stream_ids(tokenizer, content, tokens)),
        chunk=chunk,
        block=block,
        dtype=str(loaded.dtype).removeprefix("torch."),
    )
    ppl_run.run(loaded, ids, chosen, settings, out, resume, console)


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",") if name.strip()]


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


if __name__ == "__main__":
    main()
