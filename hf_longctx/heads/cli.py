"""The commands `hf-longctx heads ...`. Heavy imports are inside them, so that `--help` answers at once."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from ..options import Device, Dtype, Model, Text, names, quiet

_Lengths = Annotated[str, typer.Option(help="Tokens in a prompt, with commas between; 1k is 1024.")]
_Batch = Annotated[int, typer.Option(help="Prompts of one length that run together.")]
_Seed = Annotated[int, typer.Option(help="Draws needles and places in the text.")]
_Chunk = Annotated[
    int | None, typer.Option(help="Tokens per call of the prefill.", show_default="512 on a CPU, else 4096")
]
_Resume = Annotated[bool, typer.Option("--resume", help="Go on with the trials that are already there.")]

app = typer.Typer(
    help="Find out which heads copy from far back, and what a model is without them.", no_args_is_help=True
)


@app.callback()
def _heads() -> None:
    """Find out which heads copy from far back, and what a model is without them."""


@app.command()
def detect(
    model: Model = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The JSON file of scores to write.")] = Path("scores.json"),
    lengths: _Lengths = "1k,2k,4k,8k",
    depths: Annotated[int, typer.Option(help="Depths of the needle, from the start to the end.")] = 10,
    trials: Annotated[int, typer.Option(help="Prompts for each length and depth.")] = 4,
    forced: Annotated[bool, typer.Option("--forced/--free", help="Read the answer in one call, or write one.")] = False,
    mode: Annotated[str, typer.Option(help="paper: each place of a needle counts once; code: every time.")] = "paper",
    chat: Annotated[
        bool | None, typer.Option("--chat/--plain", help="Use the chat template.", show_default="if there is one")
    ] = None,
    needles: Annotated[
        Path | None,
        typer.Option(help="JSONL of needle, question, real_needle.", show_default="some that ship with the package"),
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 50,
    batch: _Batch = 1,
    chunk: _Chunk = None,
    seed: _Seed = 0,
    text: Text = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    resume: _Resume = False,
) -> None:
    """Score each query head: how much of a needle it copies, over the trials whose answer is right.

    Writes NAME.jsonl as it goes, then NAME.json in the published format and NAME_summary.json.
    """
    console = _begin()
    from ..evals import assets, needle
    from ..evals import text as texts
    from ..evals.grammar import lengths as read_lengths
    from ..models import inspect_model
    from . import detect as room
    from . import show
    from .needles import about as about_needles
    from .needles import load_needles

    sought, content = load_needles(needles), texts.read(text)
    sizes, places = read_lengths(lengths), needle.spread(depths)
    settings = room.Settings(sizes, places, trials, forced, bool(chat), mode, new_tokens, 4, batch, chunk, seed)
    loaded, tokenizer = assets.load(model, dtype, device, on_step=console.print)
    if chat is None:
        settings = replace(settings, chat=bool(getattr(tokenizer, "chat_template", None)))
    layers = inspect_model(loaded).layers
    asked = room.prompts(tokenizer, content, sought, settings)
    about = {**about_needles(needles, sought), **texts.about(text, content)}
    rows = room.run(loaded, tokenizer, asked, settings, out, about, resume, console)
    scores = room.score(rows, [layer.q_heads for layer in layers], mode, assets.display_name(model))
    show.publish(rows, scores, mode, [layer.kv_heads for layer in layers], about, out, console)


@app.command()
def train(
    model: Model = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the pattern to write.")] = Path("pattern"),
    steps: Annotated[int, typer.Option(help="Steps of the optimizer.")] = 2000,
    rate: Annotated[float, typer.Option(help="Learning rate between warm-up and decay.")] = 0.02,
    warmup: Annotated[int | None, typer.Option(help="Steps of the warm-up.", show_default="a fifth")] = None,
    decay: Annotated[int | None, typer.Option(help="Last steps, of the decay.", show_default="a fifth")] = None,
    weight: Annotated[float, typer.Option(help="Of the mean gate, beside the distance of the hidden states.")] = 0.05,
    sink: Annotated[int, typer.Option(help="First tokens that a streaming head sees.")] = 128,
    window: Annotated[int, typer.Option(help="Last tokens that it sees.")] = 256,
    mode: Annotated[
        str, typer.Option(help="paper: compare in the pass keys of the answers; code: everywhere after the book.")
    ] = "paper",
    shortest: Annotated[str, typer.Option(help="Tokens of the shortest lesson; 1k is 1024.")] = "3000",
    longest: Annotated[
        str | None, typer.Option(help="Of the longest.", show_default="32000, or as the model was made for")
    ] = None,
    sizes: Annotated[int, typer.Option(help="Different lengths of lessons between the two.")] = 8,
    keys: Annotated[int, typer.Option(help="Pass keys in a lesson, 10 at most.")] = 10,
    words: Annotated[int, typer.Option(help="Words of a pass key.")] = 32,
    accumulate: Annotated[int, typer.Option(help="Lessons in a step, one after the other.")] = 1,
    recompute: Annotated[
        bool, typer.Option("--recompute/--hold", help="Gradient checkpointing: slower, in far less memory.")
    ] = True,
    save_every: Annotated[int, typer.Option(help="Steps from one saved state to the next.")] = 50,
    seed: Annotated[int, typer.Option(help="Draws lengths, keys, depths and places in the text.")] = 42,
    text: Text = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the state in the folder.")] = False,
) -> None:
    """Train a gate for each KV head: which of them need all keys, for `DuoAttention(pattern="pattern/")`.

    The model stays as it is. For several GPUs: accelerate launch -m hf_longctx heads train ...
    """
    console = _begin()
    from ..evals import assets
    from ..evals import text as texts
    from ..evals.grammar import lengths
    from ..evals.team import place
    from . import train as room
    from .lessons import Lessons, Task

    content, low = texts.read(text), lengths(shortest)[0]
    high = None if longest is None else lengths(longest)[0]
    settings = room.Settings(steps, rate, warmup, decay, weight, sink, window, accumulate, recompute, save_every)
    loaded, tokenizer = assets.load(model, dtype, place(device), on_step=console.print)
    task = Task(mode, low, high or room.longest_for(loaded, low), sizes, keys, words, seed)
    lessons = Lessons(tokenizer, content, task)
    pattern = room.run(loaded, lessons, settings, out, texts.about(text, content), resume, console)
    room.publish(pattern, out, console)


@app.command()
def ablate(
    scores: Annotated[Path, typer.Option(help="JSON file of `heads detect`.")],
    model: Model = None,
    top: Annotated[int, typer.Option(help="Best heads to ablate together.")] = 10,
    control: Annotated[str, typer.Option(help="random: as many others of the same layers; none.")] = "random",
    seeds: Annotated[int, typer.Option(help="Draws of random heads.")] = 3,
    mode: Annotated[
        str, typer.Option(help="zero; mean: their mean output; uniform: the mean of all values; local: only near keys.")
    ] = "zero",
    phases: Annotated[str, typer.Option(help="In which queries: prefill,decode or one of them.")] = "prefill,decode",
    window: Annotated[int, typer.Option(help="local: tokens that a head still sees.")] = 64,
    tasks: Annotated[str, typer.Option(help="needle (a pass key), qa (extractive), cot (sums, step by step).")] = (
        "needle,qa,cot"
    ),
    lengths: _Lengths = "1k,2k,4k",
    depths: Annotated[int, typer.Option(help="needle: depths, from the start to the end.")] = 10,
    trials: Annotated[
        int, typer.Option(help="Prompts: of needle for each length and depth, else ten times so many.")
    ] = 1,
    batch: _Batch = 1,
    chunk: _Chunk = None,
    seed: _Seed = 0,
    text: Text = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the result files.")] = Path("out"),
    resume: _Resume = False,
) -> None:
    """Take heads out, and see what the model can still do; beside it random heads of the same layers.

    Writes ablate.jsonl as it goes, then ablate_summary.json, and ablate.png if matplotlib is installed (extra `plot`).
    """
    console = _begin()
    from ..evals import assets
    from ..evals import text as texts
    from ..evals.grammar import lengths as read_lengths
    from ..models import inspect_model
    from . import ablation, readouts
    from .scores import load_scores

    if control not in ("random", "none"):
        raise ValueError(f"--control: expected random or none; got '{control}'.")
    found, content, sizes = load_scores(scores), texts.read(text), read_lengths(lengths)
    how = ablation.How(mode, tuple(names(phases)), window, batch, chunk, out, resume, {"scores": scores.name})
    loaded, tokenizer = assets.load(model, dtype, device, on_step=console.print)
    heads = [layer.q_heads for layer in inspect_model(loaded).layers]
    asked = ablation.conditions(found, heads, top, range(seeds) if control == "random" else ())
    exams = readouts.exams(tokenizer, names(tasks), text, sizes, depths, trials, seed)
    rows = ablation.run(loaded, tokenizer, exams, asked, content, how, console)
    ablation.publish(rows, f"{assets.display_name(model)}: {mode} in {phases}", out, console)


@app.command()
def show(
    files: Annotated[list[str], typer.Argument(help="Scores, a pattern's folder or its name; two to compare.")],
    top: Annotated[int, typer.Option(help="Heads in a table, and to compare.")] = 10,
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG to write.")] = Path("heads.png"),
) -> None:
    """Show the top heads of one or two files, whether they agree, a map of layers and heads, and how gates lie."""
    from rich.console import Console

    from . import show as room

    if len(files) > 2:
        raise ValueError(f"heads show: expected one or two files; got {len(files)}.")
    console, found = Console(), [room.read(name) for name in files]
    said = room.agreement(found[0], found[1], top) if len(found) == 2 else None
    for each in found:
        console.print(room.top_heads(each, top))
    if said:
        console.print(said, soft_wrap=True)
    room.draw(found, out, console)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Scores, a pattern's folder or its name.")],
    to: Annotated[str, typer.Option(help="duo: gates of KV heads; scores: of query heads.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder (duo) or JSON file (scores) to write.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Whose heads they are.")] = None,
    kv_heads: Annotated[
        int | None, typer.Option(help="duo: KV heads of a layer.", show_default="the model's, or of NAME_summary.json")
    ] = None,
    q_heads: Annotated[
        int | None, typer.Option(help="scores: query heads of a layer.", show_default="the model's")
    ] = None,
    reduce: Annotated[str, typer.Option(help="duo: max or mean of the query heads of a KV head.")] = "max",
) -> None:
    """Turn scores of query heads into gates of KV heads, which `DuoAttention(pattern=...)` takes, or back."""
    from . import convert as room
    from . import show
    from .pattern import HeadPattern
    from .pattern_io import save_pattern
    from .scores import HeadScores, save_scores

    if to not in ("duo", "scores"):
        raise ValueError(f"--to: expected duo or scores; got '{to}'.")
    found = show.read(source)
    if to == "duo":
        if isinstance(found, HeadScores):
            found = room.to_pattern(found, show.heads_of(source, model, kv_heads, "kv_heads"), reduce)
        save_pattern(found, out)
    else:
        if isinstance(found, HeadPattern):
            found = room.to_scores(found, show.heads_of(source, model, q_heads, "q_heads"))
        save_scores(found, out)
    typer.echo(f"{'Pattern' if to == 'duo' else 'Scores'}: {out}")


def _begin() -> Any:
    """The console, when the heavy libraries are there."""
    from rich.console import Console

    console = Console()
    with console.status("Loading the libraries"):
        import_module("transformers")
    quiet()
    return console
