"""The commands `hf-longctx eval ...`. Heavy imports are inside them, so that `--help` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..options import Device, Dtype, Model, Text, names, quiet

if TYPE_CHECKING:
    from rich.console import Console

    from .runner import Options

_Methods = Annotated[
    str, typer.Option(help="Methods with commas between, knobs in parentheses: streaming_llm(sinks=4,window=508).")
]
_Lengths = Annotated[str, typer.Option(help="Tokens in a prompt, with commas between; 1k is 1024.")]
_Chunk = Annotated[
    int | None,
    typer.Option(help="Tokens per call of the prefill: changes the time.", show_default="512 on a CPU, else 4096"),
]
_Batch = Annotated[int, typer.Option(help="Prompts of one length that run together.")]
_Seed = Annotated[int, typer.Option(help="Draws keys, depths and places in the text.")]
_Dense = Annotated[bool, typer.Option("--dense/--no-dense", help="Run dense first, as the baseline.")]
_NewTokens = Annotated[int, typer.Option(help="Tokens to generate.")]
_Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the result files.")]
_Resume = Annotated[bool, typer.Option("--resume", help="Go on with the trials that the folder already has.")]

app = typer.Typer(
    help="Measure a model under several methods. Several GPUs share the trials of needle, passkey and ruler: "
    "accelerate launch -m hf_longctx eval ...",
    no_args_is_help=True,
)


@app.callback()
def _evals() -> None:
    """Measure a model under several methods."""


@app.command()
def needle(
    model: Model = None,
    methods: _Methods = "dense,streaming_llm",
    lengths: _Lengths = "1k,2k,4k,8k",
    depths: Annotated[int, typer.Option(help="Depths of the needle, from the start to the end.")] = 10,
    trials: Annotated[int, typer.Option(help="Prompts for each length and depth.")] = 1,
    new_tokens: _NewTokens = 12,
    chunk: _Chunk = None,
    batch: _Batch = 1,
    seed: _Seed = 0,
    dense: _Dense = True,
    text: Text = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: _Out = Path("out"),
    resume: _Resume = False,
) -> None:
    """Hide a pass key at every depth of every length; draw what each method finds.

    Writes needle.jsonl as it goes, then needle_summary.json, and needle.png if matplotlib is installed (extra `plot`).
    """
    console, options, where = _begin(methods, text, chunk, batch, dense, seed, out, resume, device)
    from . import assets, needle
    from .grammar import lengths as read_lengths
    from .passkey import check

    check("needle", trials, new_tokens)
    sizes, places = read_lengths(lengths), needle.spread(depths)
    loaded, tokenizer = assets.load(model, dtype, where, on_step=console.print)
    needle.run(
        loaded,
        tokenizer,
        methods,
        sizes,
        places,
        trials,
        text=text,
        new_tokens=new_tokens,
        options=options,
        console=console,
    )


@app.command()
def passkey(
    model: Model = None,
    methods: _Methods = "dense,streaming_llm",
    lengths: _Lengths = "1k,2k,4k",
    trials: Annotated[int, typer.Option(help="Prompts for each length, each with a depth of its own.")] = 10,
    new_tokens: _NewTokens = 12,
    chunk: _Chunk = None,
    batch: _Batch = 1,
    seed: _Seed = 0,
    dense: _Dense = True,
    text: Text = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: _Out = Path("out"),
    resume: _Resume = False,
) -> None:
    """Hide pass keys at random depths; count how many each method finds.

    Writes passkey.jsonl as it goes, then passkey_summary.json.
    """
    console, options, where = _begin(methods, text, chunk, batch, dense, seed, out, resume, device)
    from . import assets, passkey
    from .grammar import lengths as read_lengths

    passkey.check("passkey", trials, new_tokens)
    sizes = read_lengths(lengths)
    loaded, tokenizer = assets.load(model, dtype, where, on_step=console.print)
    passkey.run(
        loaded, tokenizer, methods, sizes, trials, text=text, new_tokens=new_tokens, options=options, console=console
    )


@app.command()
def ruler(
    model: Model = None,
    methods: _Methods = "dense,streaming_llm",
    tasks: Annotated[
        str, typer.Option(help="Task families with commas between. qa needs data that is not shipped.")
    ] = ("niah_single,niah_multikey,niah_multivalue,niah_multiquery,vt,cwe,fwe"),
    lengths: _Lengths = "4k",
    samples: Annotated[int, typer.Option(help="Prompts for each task and length.")] = 10,
    chunk: _Chunk = None,
    batch: _Batch = 1,
    seed: _Seed = 0,
    dense: _Dense = True,
    text: Text = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: _Out = Path("out"),
    resume: _Resume = False,
) -> None:
    """Run RULER tasks, made from the text; the score is the share of the expected strings in the answer.

    Writes ruler.jsonl as it goes, then ruler_summary.json. A length is that of prompt and answer together.
    """
    console, options, where = _begin(methods, text, chunk, batch, dense, seed, out, resume, device)
    from . import assets
    from . import ruler as tasks_of_ruler
    from .grammar import lengths as read_lengths

    sizes, asked = read_lengths(lengths), names(tasks)
    tasks_of_ruler.check(asked, samples)
    loaded, tokenizer = assets.load(model, dtype, where, on_step=console.print)
    tasks_of_ruler.run(loaded, tokenizer, methods, asked, sizes, samples, text=text, options=options, console=console)


@app.command()
def ppl(
    model: Model = None,
    text: Text = None,
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
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for ppl.json and ppl.png.")] = Path("out"),
    resume: Annotated[
        bool, typer.Option(help="Keep the methods that ppl.json already has for these settings.")
    ] = False,
) -> None:
    """Perplexity along one long text, per block of positions, for several methods in one run.

    Writes ppl.json after every method, and ppl.png if matplotlib is installed (extra `plot`).
    """
    from rich.console import Console

    console = Console()
    with console.status("Loading the libraries"):
        from . import assets, ppl_run, team
        from . import text as texts
        from .ppl import check, variants
    quiet()
    team.alone("eval ppl")

    check(chunk, block, tokens, dense_tokens)
    chosen = variants(names(methods), sinks, window, dense_tokens, sparsity)
    content = texts.read(text)
    loaded, tokenizer = assets.load(model, dtype, device, on_step=console.print)
    settings = ppl_run.Settings(
        model=assets.display_name(model),
        **texts.about(text, content),
        tokens=len(ids := texts.stream_ids(tokenizer, content, tokens)),
        chunk=chunk,
        block=block,
        dtype=str(loaded.dtype).removeprefix("torch."),
    )
    ppl_run.run(loaded, ids, chosen, settings, out, resume, console)


@app.command()
def stream(
    model: Annotated[str, typer.Option("--model", "-m", help="Vision-language model: hub id or folder.")],
    video: Annotated[
        str | None, typer.Option(help="Video file.", show_default="half a minute of Big Buck Bunny, CC-BY 3.0")
    ] = None,
    loop: Annotated[bool, typer.Option("--loop/--no-loop", help="Over and over, with a sign on every second.")] = True,
    seconds: Annotated[int, typer.Option(help="Of stream, at most.", min=1)] = 60,
    variants: Annotated[
        str, typer.Option(help="window, recompute (it anew each round), full (all is kept), native (positions grow).")
    ] = "window,recompute,full,native",
    full_s: Annotated[float, typer.Option(help="Seconds after which full stops: it grows.")] = 120.0,
    fps: Annotated[float, typer.Option(help="Frames a second.")] = 2.0,
    window_s: Annotated[float, typer.Option(help="Seconds that pictures are kept.")] = 16.0,
    text_sink: Annotated[int, typer.Option(help="First tokens of text that are kept.")] = 512,
    text_window: Annotated[int, typer.Option(help="Last tokens of text that are kept.")] = 512,
    new_tokens: _NewTokens = 20,
    query: Annotated[str, typer.Option(help="What the model is asked to do.")] = "Name the sign: colour and number.",
    max_pixels: Annotated[int | None, typer.Option(help="Scale larger frames down.")] = 200_000,
    reference: Annotated[
        Path | None, typer.Option(help="Captions as they should be: .srt, .vtt, .jsonl.", show_default="the signs")
    ] = None,
    tolerance_s: Annotated[float, typer.Option(help="Seconds that a word may be early or late.")] = 1.0,
    judge: Annotated[str | None, typer.Option(help="package.module:function of two texts, asked beside.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: _Out = Path("out"),
) -> None:
    """Latency, memory and captions along a stream: a window, its recomputation, full attention, native positions.

    Writes stream.jsonl as it goes, stream_summary.json, and stream.png if matplotlib is installed.
    """
    from rich.console import Console

    console = Console()
    with console.status("Loading the libraries"):
        from . import stream_run, team
        from .stream_variants import Sizes
    quiet()
    team.alone("eval stream")
    asked = stream_run.Asked(video, loop, seconds, fps, max_pixels, reference, tolerance_s, judge)
    sizes = Sizes(window_s, text_sink, text_window, new_tokens, query)
    stream_run.run(model, dtype, device, names(variants), full_s, asked, sizes, out, console)


def _begin(
    methods: str,
    text: Path | None,
    chunk: int | None,
    batch: int,
    dense: bool,
    seed: int,
    out: Path,
    resume: bool,
    device: str,
) -> tuple[Console, Options, str]:
    """The console, the common options and this process's device; what is none is refused before a model is loaded."""
    from rich.console import Console

    console = Console()
    with console.status("Loading the libraries"):
        from . import grammar, team
        from . import text as texts
        from .runner import Options
    quiet()
    grammar.methods(methods)
    texts.read(text)
    where, first = team.place(device), team.first()
    return console if first else Console(quiet=True), Options(chunk, batch, dense, seed, out, resume), where
