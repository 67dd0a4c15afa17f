"""A whole search for thresholds: texts, progress, table and file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..evals.results import meta, save_json
from ..evals.text import opening_ids, token_ids
from ..methods.layouts import require_full_attention
from ..models import ModelFacts, inspect_model
from .collect import Findings, collect
from .thresholds import Thresholds
from .xattention import START, covered, density, fewest_blocks

METHODS = ("dp", "heuristic")
_PLAIN = f"{START} for all"


@dataclass(frozen=True)
class Settings:
    """What a search was asked for; stored with the result.

    Attributes:
        model: name without the path of any machine.
        method: `dp` or `heuristic`.
        stride: tokens of a tile.
        block: tokens of a block.
        length: tokens of a text.
        samples: texts.
        coverage: share of the true attention.
        steps: of `dp`.
        text: name of the file.
        text_sha256: of its content.
    """

    model: str
    method: str
    stride: int
    block: int
    length: int
    samples: int
    coverage: float
    steps: int
    text: str
    text_sha256: str

    def __post_init__(self) -> None:
        block, stride = max(self.block, 1), max(self.stride, 1)  # what is below is refused first
        for name, holds, wanted in (
            ("method", self.method in METHODS, f"among {', '.join(METHODS)}"),
            ("block", self.block > 0, ">= 1"),
            ("stride", self.stride > 0 and block % stride == 0, f"that divides the block of {self.block}"),
            ("length", self.length % block == 0 and self.length >= 3 * block, "in whole blocks, at least 3"),
            ("samples", self.samples > 0, ">= 1"),
            ("coverage", 0 < self.coverage <= 1, "in (0, 1]"),
            ("steps", self.steps > 0, ">= 1"),
        ):
            if not holds:
                raise ValueError(f"tune xattention: expected {name} {wanted}; got {getattr(self, name)!r}. Change it.")


def texts(tokenizer: Any, text: str, length: int, samples: int) -> list[torch.Tensor]:
    """Samples that follow each other in a text, each opened as the tokenizer opens a text: `[length]`, int64.

    Raises:
        ValueError: the text is shorter than all of them.
    """
    opening, ids = opening_ids(tokenizer), token_ids(tokenizer, text)
    fresh = length - len(opening)
    if len(ids) < fresh * samples:
        raise ValueError(
            f"--text: expected at least {fresh * samples:,} tokens for {samples} samples of {length:,}; got "
            f"{len(ids):,}. Pass a longer text, or ask for less."
        )
    return [torch.tensor(opening + ids[i * fresh : (i + 1) * fresh]) for i in range(samples)]


def run(model: Any, samples: Sequence[torch.Tensor], settings: Settings, out: Path, console: Console) -> Thresholds:
    """Find thresholds, show what they read and cover, and save them.

    Args:
        model: an unpatched causal language model.
        samples: each `[length]`, int64.
        settings: what was asked for.
        out: the JSON file.
        console: where bar and table go.

    Raises:
        UnsupportedError: this model cannot be looked at, and why.
    """
    facts = inspect_model(model)
    require_full_attention("tune xattention", facts)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as bars:
        task = bars.add_task("layers of all texts", total=len(facts.layers) * len(samples))
        shape = settings.stride, settings.block, settings.coverage
        findings = collect(model, samples, *shape, lambda: bars.advance(task))
    found = choose(findings, settings)
    console.print(table(findings, found, settings))
    heads = [curve for layer in findings.curves.values() for curve in layer]
    mine = found[settings.method]
    about = meta(model.device, asdict(settings)) | {"density": density(heads, mine), "covered": covered(heads, mine)}
    tau = _by_layer(facts, findings, mine)
    result = Thresholds(settings.model, facts.family, settings.stride, settings.block, tau, about)
    save_json(out, result.to_json())
    console.print(f"Thresholds: {out}", soft_wrap=True)
    return result


def choose(findings: Findings, settings: Settings) -> dict[str, list[float]]:
    """Thresholds of all heads, layer after layer, by each method, and one for all of them."""
    heads = [curve for layer in findings.curves.values() for curve in layer]
    return {
        _PLAIN: [START] * len(heads),
        "heuristic": [tau for layer in findings.at_coverage.values() for tau in layer],
        "dp": fewest_blocks(heads, settings.coverage, settings.steps).tolist(),
    }


def table(findings: Findings, found: dict[str, list[float]], settings: Settings) -> Table:
    """What each method's thresholds read and cover on the texts."""
    heads = [curve for layer in findings.curves.values() for curve in layer]
    title = f"{settings.model}: {len(heads)} query heads, {settings.samples} texts of {settings.length:,} tokens"
    shown = Table(title=title, title_justify="left")
    for column in ("thresholds", "mean", "least", "largest", "blocks read", "attention covered"):
        shown.add_column(column, justify="left" if column == "thresholds" else "right")
    for name, taus in found.items():
        numbers = (f"{sum(taus) / len(taus):.3f}", f"{min(taus):.3f}", f"{max(taus):.3f}")
        shares = (f"{density(heads, taus):.1%}", f"{covered(heads, taus):.2%}")
        saved = " (saved)" if name == settings.method else ""
        shown.add_row(name + saved, *numbers, *shares)
    return shown


def _by_layer(facts: ModelFacts, findings: Findings, taus: Sequence[float]) -> tuple[tuple[float, ...], ...]:
    """Thresholds of all heads as `[L][Hq]`; 1 in layers with a sliding window of their own, where nothing selects."""
    rest = iter(taus)
    return tuple(
        tuple(next(rest) if i in findings.curves else 1.0 for _ in range(layer.q_heads))
        for i, layer in enumerate(facts.layers)
    )
