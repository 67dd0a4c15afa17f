"""The commands `hf-longctx bench ...`. Heavy imports are inside them, so that `--help` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options import Device, Dtype, Text, quiet

app = typer.Typer(help="Time a model, or one operation, beside dense and what others have.", no_args_is_help=True)

_Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the result files.")]
_Resume = Annotated[bool, typer.Option("--resume", help="Go on with the cells that the folder already has.")]


@app.callback()
def _bench() -> None:
    """Time a model, or one operation, beside dense and what others have."""


_Source = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Hub id, folder or .gguf; with --random a config.json will do.",
        show_default="SmolLM2-135M-Instruct",
    ),
]
_Methods = Annotated[str, typer.Option(help="Methods, knobs in parentheses; dense runs in any case.")]
_Lengths = Annotated[str, typer.Option(help="Tokens in a prompt, with commas between; 1k is 1024, 1m 1024 times that.")]
_Peers = Annotated[
    str,
    typer.Option(
        help="Others: unpatched, hf:static, hf:offloaded, hf:fp8, hf:hqq, hf:quanto, kvpress:snapkv; all; none."
    ),
]
_Random = Annotated[bool, typer.Option("--random", help="Random weights and prompts, from the configuration alone.")]


@app.command()
def model(
    model: _Source = None,
    methods: _Methods = "dense,quest,streaming_llm",
    lengths: _Lengths = "1k,2k,4k",
    peers: _Peers = "unpatched",
    tokens: Annotated[int, typer.Option(help="Decode steps that are counted in a run.")] = 64,
    runs: Annotated[int, typer.Option(help="Prompts of each length, one after the other.")] = 3,
    batch: Annotated[int, typer.Option(help="Prompts of one length that run together.")] = 1,
    random: _Random = False,
    seed: Annotated[int, typer.Option(help="Draws prompts, and random weights.")] = 0,
    text: Text = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: _Out = Path("out"),
    resume: _Resume = False,
) -> None:
    """Prefill, time to first token, decode, bytes and pass keys found: methods x lengths, and from where on each pays.

    Writes bench_model.jsonl as it goes, bench_model_crossover.json, run_meta.json, and bench_speed.png and
    bench_memory.png if matplotlib is installed (extra `plot`). A cell that runs out of memory is written as such.
    """
    from rich.console import Console

    console = Console()
    with console.status("Loading the libraries"):
        from ..evals import assets, grammar
        from ..evals import text as texts
        from . import model as cells
        from . import show
        from .peers import choose
    quiet()
    grammar.methods(methods)
    texts.read(text)
    sizes, settings = grammar.lengths(lengths), cells.Settings(tokens, runs, batch, seed, text)
    others, absent = choose(peers, assets.pick_device(device))
    for line in absent:
        console.print(line, style="yellow", markup=False)
    loaded, tokenizer = cells.load(model, dtype, device, seed if random else None, console)
    rows = cells.run(loaded, tokenizer, methods, others, sizes, settings, out, resume, console)
    show.publish(rows, out, cells.title(loaded, settings), console)


@app.command()
def op(
    names: Annotated[list[str], typer.Argument(help="Names of operations, as below; all: every one.")],
    lengths: Annotated[str, typer.Option(help="Tokens that are stored, with commas between.")] = "4k,32k",
    batch: Annotated[int, typer.Option(help="Rows.", min=1)] = 1,
    q_heads: Annotated[int, typer.Option(help="Query heads.", min=1)] = 32,
    kv_heads: Annotated[int, typer.Option(help="KV heads.", min=1)] = 8,
    dim: Annotated[int, typer.Option(help="Channels of a head.", min=1)] = 128,
    bits: Annotated[int, typer.Option(help="Of stored keys and values: 16 as --dtype has them, 8 or 4.")] = 16,
    budget: Annotated[int, typer.Option(help="Tokens that are chosen.", min=16)] = 4096,
    window: Annotated[int, typer.Option(help="Tokens of the window of a streaming head.", min=8)] = 1024,
    repeats: Annotated[int, typer.Option(help="Rounds, whose median is shown.", min=1)] = 20,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    out: _Out = Path("out"),
    resume: _Resume = False,
) -> None:
    """Time operations on every backend that takes them, and beside others, once they were found right.

    attend, attend_chosen, prefill, prefill_window, prefill_chosen, score, pick, antidiagonal, append: each is compared
    with its definition on small sizes first; one that differs is named and not timed.
    Writes bench_op.jsonl as it goes, and run_meta.json.
    """
    from rich.console import Console

    console = Console()
    with console.status("Loading the libraries"):
        from ..evals import assets, grammar
        from . import op as timed
        from .operations import OPERATIONS, Size
    sizes = [
        Size(tokens, batch, q_heads, kv_heads, dim, bits, budget, window, timed.dtype_of(dtype))
        for tokens in grammar.lengths(lengths)
    ]
    place = assets.pick_device(device)
    wanted = list(OPERATIONS) if names == ["all"] else names
    rows = timed.run(wanted, sizes, place, out, repeats, resume, console)
    console.print(timed.table(rows, timed.title(sizes[0], place)))
    for row in rows:
        if row.error is not None:
            console.print(f"{row.name}, {row.by}, {row.tokens:,} tokens: {row.error}", markup=False, soft_wrap=True)
    console.print(f"Numbers: {out / timed.NAME}.jsonl", soft_wrap=True)
