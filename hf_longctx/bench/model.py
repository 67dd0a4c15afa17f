"""`hf-longctx bench model`: every method and peer at every length, cell by cell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..configs import build
from ..evals import assets
from ..evals import text as texts
from ..evals.grammar import Choice
from ..evals.journal import Journal
from ..evals.passkey import exam, judge
from ..evals.runner import bar, derive, model_name, settle
from ..machine import device_name
from . import cost
from .peers import Peer
from .rows import BASELINE, Row, of_costs

NAME = "bench_model"


@dataclass(frozen=True)
class Settings:
    """What all cells share.

    Attributes:
        tokens: decode steps that are counted in a run.
        runs: prompts one after the other; each has another pass key.
        batch: prompts that run together.
        seed: draws prompts.
        text: a UTF-8 file around the pass keys; None is the text that ships with the package.
    """

    tokens: int = 64
    runs: int = 3
    batch: int = 1
    seed: int = 0
    text: Path | None = None

    def __post_init__(self) -> None:
        for name, least in (("tokens", 2), ("runs", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name}: expected at least {least}; got {getattr(self, name)}.")


@dataclass(frozen=True)
class Way:
    """A method or a peer: its name, and the block in which it is in force, which gives arguments for `generate`."""

    name: str
    running: Callable[[Any], AbstractContextManager[dict[str, Any]]]
    ours: bool


def run(
    model: Any,
    tokenizer: Any,
    methods: str,
    peers: Sequence[Peer],
    lengths: Sequence[int],
    settings: Settings,
    out: Path,
    resume: bool = False,
    console: Console | None = None,
) -> list[Row]:
    """Measure every cell, the shortest length first, dense before all others; a line of the file for each.

    Args:
        model: an unpatched causal language model; it is unpatched again afterwards.
        tokenizer: its tokenizer; None: prompts are random tokens, and nothing is scored.
        methods: as `evals.grammar.methods` reads them; dense is measured in any case.
        peers: from `peers.choose`.
        lengths: tokens of a prompt.
        settings: what all cells share.
        out: folder for `bench_model.jsonl` and `run_meta.json`.
        resume: go on with the cells that are there.
        console: where the bar goes; None shows none.

    Returns:
        A row for each cell; one that ran out of memory, or whose peer failed, says so.

    Raises:
        ValueError: a method, knob or length that does not fit, or rows of other settings; nothing ran.
        UnsupportedError: the model cannot do one of the methods; nothing ran.
    """
    ways = [_method(choice) for choice in settle(model, methods, True)] + [_peer(peer) for peer in peers]
    next(_prompts(model, tokenizer, min(lengths), settings))  # too short a length is refused before anything runs
    journal = Journal(out, NAME, _about(model, tokenizer, settings), model.device, resume)
    done = {(row.method, row.length): row for row in (Row(**row) for row in journal.rows)}
    with bar(console) as shown:
        task = shown.add_task("", total=len(ways) * len(lengths), said="")
        for length in sorted(lengths):
            prompts: list[tuple[Tensor, list[str]]] = []
            for way in ways:
                shown.update(task, description=way.name, said=f"{length:,} tokens")
                if (way.name, length) not in done:
                    prompts = prompts or list(_prompts(model, tokenizer, length, settings))
                    row = _beside(_cell(model, tokenizer, way, length, prompts, settings), done.get((BASELINE, length)))
                    journal.append([asdict(row)])
                    done[way.name, length] = row
                shown.advance(task)
    return [done[way.name, length] for length in sorted(lengths) for way in ways]


def load(source: str | None, dtype: str, device: str, seed: int | None, console: Console) -> tuple[Any, Any]:
    """A model and its tokenizer; with a seed one of random weights, from its configuration, and None."""
    if seed is None:
        return assets.load(source, dtype, device, on_step=console.print)
    return build(source, dtype, assets.pick_device(device), seed), None


def title(model: Any, settings: Settings) -> str:
    """What was measured where, in a line."""
    rows = f", {settings.batch} rows" if settings.batch > 1 else ""
    return f"{model_name(model)}, {str(model.dtype).removeprefix('torch.')}, {device_name(model.device)}{rows}"


def _method(choice: Choice) -> Way:
    @contextmanager
    def running(model: Any) -> Iterator[dict[str, Any]]:
        from .. import patched

        with patched(model, choice.method, **choice.knobs):
            yield {}

    return Way(choice.name, running, True)


def _peer(peer: Peer) -> Way:
    return Way(peer.name, peer.running, False)


def _about(model: Any, tokenizer: Any, settings: Settings) -> dict[str, Any]:
    """What decides about the numbers."""
    shared = {name: value for name, value in asdict(settings).items() if name != "text"}
    prompts = {"prompts": "random tokens"}
    if tokenizer is not None:
        prompts = {"prompts": "pass keys", **texts.about(settings.text, texts.read(settings.text))}
    return {
        "model": model_name(model),
        "weights": "random" if tokenizer is None else "the checkpoint's",
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(model.device),
        **shared,
        **prompts,
    }


def _prompts(model: Any, tokenizer: Any, length: int, settings: Settings) -> Iterator[tuple[Tensor, list[str]]]:
    """Prompts of one length, a batch for each run: `[B, T]`, int64, on the CPU, with the pass keys that they hold."""
    if tokenizer is None:
        words = model.get_input_embeddings().weight.shape[0]
        for number in range(settings.runs):
            made = torch.Generator().manual_seed(derive(settings.seed, NAME, length, number))
            yield torch.randint(0, words, (settings.batch, length), generator=made), []
        return
    many = settings.runs * settings.batch
    asked = exam(tokenizer, NAME, [length], None, many, settings.text, settings.tokens, settings.seed)
    trials = list(asked.trials)
    for first in range(0, many, settings.batch):
        some = trials[first : first + settings.batch]
        yield torch.stack([trial.ids for trial in some]), [trial.expected[0] for trial in some]


def _cell(
    model: Any, tokenizer: Any, way: Way, length: int, prompts: list[tuple[Tensor, list[str]]], settings: Settings
) -> Row:
    """Measure one; what stops it is its row, if it is memory, or a peer's own failure."""
    row = Row(way.name, length, settings.batch, settings.tokens)
    try:
        with way.running(model) as extra:
            costs = []
            cost.warm(model, prompts[0][0].to(model.device), extra)
            for ids, _ in prompts:
                costs.append(cost.cost(model, ids.to(model.device), settings.tokens, extra))
        right = partial(_right, tokenizer)
        scores = [x for run, (_, keys) in zip(costs, prompts, strict=True) for x in right(run.new, keys)]
        return of_costs(way.name, length, settings.batch, settings.tokens, costs, mean(scores) if scores else None)
    except Exception as error:  # a peer's code may raise anything; ours is let through below
        if not cost.out_of_memory(error) and way.ours:
            raise
        said = " ".join(str(error).split())[:200]
        kind = "out of memory" if cost.out_of_memory(error) else type(error).__name__
        row = replace(row, error=f"{kind}: {said}")
    cost.free()  # the traceback, and with it the tensors that it held, are gone
    return row


def _right(tokenizer: Any, new: Tensor, keys: list[str]) -> list[float]:
    """Whether each answer begins with its key."""
    said = [tokenizer.decode(ids, skip_special_tokens=True) for ids in new] if keys else []
    return [float(judge(answer, key)) for answer, key in zip(said, keys, strict=True)]


def _beside(row: Row, dense: Row | None) -> Row:
    """The row with the baseline's values; the baseline is its own."""
    base = row if row.method == BASELINE else dense
    if base is None or base.error is not None:
        return row
    return replace(
        row,
        dense_prefill_s=base.prefill_s,
        dense_token_ms=base.token_ms,
        dense_kv_bytes=base.kv_bytes,
        dense_peak_bytes=base.peak_bytes,
        dense_score=base.score,
    )
