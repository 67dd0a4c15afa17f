"""Perplexity along one long text, per block of positions: flat means that the stream could go on for ever."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from ..methods import make
from ..models import CACHE
from .grammar import Choice

WINDOW_ONLY = "window"
"""Not a method but the baseline of StreamingLLM: no sinks, as many tokens stored."""


@dataclass(frozen=True)
class Variant(Choice):
    """One line of the plot.

    Attributes:
        limit: at most this many tokens of the text, None for all.
    """

    limit: int | None = None


@dataclass(frozen=True)
class Row:
    """One block of positions under one method.

    Attributes:
        method: name of the variant.
        start: position of the first predicted token.
        stop: one past the last; shorter than a block where the text ends.
        nll: mean negative log-likelihood of the block's tokens, in nats.
        ppl: its exponential.
        kv_bytes: held at the end of the block.
        seconds: since the start of the text.
    """

    method: str
    start: int
    stop: int
    nll: float
    ppl: float
    kv_bytes: int
    seconds: float


def variants(
    names: list[str], sinks: int, window: int, dense_tokens: int | None = None, sparsity: float = 0.5
) -> list[Variant]:
    """Variants by name, with the knobs that the command line offers.

    Raises:
        ValueError: no names, one that is given twice, or one that is no method; names the nearest.
    """
    if not names or len(set(names)) != len(names):
        raise ValueError(f"methods: expected at least one name and none twice; got {', '.join(names) or 'nothing'}.")
    known = {
        "dense": Variant("dense", "dense", limit=dense_tokens),
        WINDOW_ONLY: Variant(WINDOW_ONLY, "streaming_llm", {"sinks": 0, "window": sinks + window}),
        "streaming_llm": Variant("streaming_llm", "streaming_llm", {"sinks": sinks, "window": window}),
        "duo_attention": Variant("duo_attention", "duo_attention", {"sparsity": sparsity}, limit=dense_tokens),
    }
    chosen = [known.get(name, Variant(name, name)) for name in names]
    for variant in chosen:
        make(variant.method, variant.knobs)
    return chosen


def check(chunk: int, block: int, *tokens: int | None) -> None:
    """Refuse what is wrong for every model.

    Raises:
        ValueError: `block` is no multiple of `chunk`, or fewer than two tokens, of which one has no perplexity.
    """
    if chunk < 1 or block < 1 or block % chunk:
        raise ValueError(f"ppl: expected a block that is a multiple of the chunk; got block {block} and chunk {chunk}.")
    for count in tokens:
        if count is not None and count < 2:
            raise ValueError(f"ppl: expected at least 2 tokens; got {count}.")


def token_nll(model: Any, ids: torch.Tensor, chunk: int) -> Iterator[torch.Tensor]:
    """Negative log-likelihood of every token but the first, given all before it as far as the model keeps them.

    Args:
        model: a causal language model, patched or not.
        ids: `[S]`, int64.
        chunk: tokens per call.

    Yields:
        `[<= chunk]`, float32, nats, on the model's device; together `S - 1` values.
    """
    cache = None
    ids = ids.to(model.device)
    for start in range(0, len(ids) - 1, chunk):
        targets = ids[start + 1 : start + 1 + chunk]
        with torch.no_grad():
            out = model(ids[None, start : start + len(targets)], use_cache=True, **{CACHE: cache})
            yield cross_entropy(out.logits[0].float(), targets, reduction="none")
        cache = getattr(out, CACHE)


def evaluate(
    model: Any, ids: torch.Tensor, variant: Variant, chunk: int, block: int, on_tokens: Callable[[int], None]
) -> list[Row]:
    """Run one variant over the text.

    Args:
        model: an unpatched causal language model; it is unpatched again afterwards.
        ids: `[S]`, int64.
        variant: how to patch, and how far to go.
        chunk: tokens per call. Changes the time, not the result.
        block: positions per row. A multiple of `chunk`, so that `kv_bytes` is that of the block's end.
        on_tokens: called with the number of tokens done since its last call.

    Returns:
        A row per block.

    Raises:
        ValueError: as `check`.
    """
    from .. import patched, report

    check(chunk, block, variant.limit)
    ids = ids[: variant.limit]
    rows: list[Row] = []
    pending: list[torch.Tensor] = []
    begin = time.perf_counter()
    with patched(model, variant.method, **variant.knobs):
        done = 0
        for nll in token_nll(model, ids, chunk):
            pending.append(nll)
            done += len(nll)
            if done % block == 0 or done == len(ids) - 1:
                values = torch.cat(pending).double().cpu()  # waits for the device, so that the clock is right
                mean, held = values.mean().item(), report(model).kv_bytes
                seconds = time.perf_counter() - begin
                start = done - len(values) + 1
                rows.append(Row(variant.name, start, done + 1, mean, math.exp(min(mean, 700.0)), held, seconds))
                pending = []
            on_tokens(len(nll))
    return rows


def plot(rows: list[Row], path: Any, title: str, trained: int | None) -> None:
    """Draw perplexity over position, a line per method, logarithmic, as a PNG.

    Args:
        rows: of all methods.
        path: of the PNG.
        title: above the plot.
        trained: the model's trained length, drawn as a vertical line; None draws none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name in dict.fromkeys(row.method for row in rows):
        mine = [row for row in rows if row.method == name]
        axes.plot([(row.start + row.stop) / 2 for row in mine], [row.ppl for row in mine], marker=".", label=name)
    if trained is not None and trained < max(row.stop for row in rows):
        axes.axvline(trained, color="grey", linestyle="--", linewidth=1)
        axes.text(
            trained, 0.98, f" trained to {trained:,}", transform=axes.get_xaxis_transform(), va="top", color="grey"
        )
    axes.set(xlabel="position in the text (tokens)", ylabel="perplexity of the block", yscale="log", title=title)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)
