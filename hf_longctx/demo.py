"""`hf-longctx demo`: a pass key hidden in a real text, asked of a real model under every method."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import TextStreamer

from . import patched, supports
from .evals.passkey import Passkey, judge
from .evals.respond import Answer, respond

_CHUNK = 256
METHODS = ("dense", "streaming_llm", "duo_attention", "quest")
"""Methods that are shown if none is named: one of a kind, so that all of them take less than two minutes."""


@dataclass(frozen=True)
class Outcome:
    """One method on one prompt.

    Attributes:
        method: its name.
        answer: what the model wrote, and what it took.
        right: whether that was the key.
    """

    method: str
    answer: Answer
    right: bool


class TimedStreamer(TextStreamer):
    """Prints words as they come, and notes when each token came.

    Attributes:
        times: seconds, of the prompt first, then of every new token.
    """

    def __init__(self, tokenizer: Any, console: Console, progress: Progress, label: str) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.console, self.progress, self.label = console, progress, label
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then one token at a time."""
        self.times.append(time.perf_counter())
        if len(self.times) == 2:
            self.progress.stop()
            self.console.out(self.label, end="", highlight=False)
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Show a piece of text that later tokens cannot change."""
        self.console.out(text.replace("\n", " "), end="\n" if stream_end else "", highlight=False, style="bold")


def choose(model: Any, wanted: list[str] | None, knobs: dict[str, dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Methods to run, and a line for each that this model does not support.

    Args:
        model: the model.
        wanted: names that the user gave: all of them are tried now, so that a bad one costs no waiting.
        knobs: of each method, by name.

    Raises:
        ValueError: a name or knob that is none.
        UnsupportedError: the model cannot do a method that the user named.
    """
    for name in wanted or []:
        with patched(model, name, **knobs.get(name, {})):
            pass
    if wanted:
        return wanted, []
    answers = [answer for answer in supports(model) if answer.method in METHODS]
    return [a.method for a in answers if a.ok], [f"{a.method} is left out: {a.reason}" for a in answers if not a.ok]


def ask(
    model: Any, tokenizer: Any, trial: Passkey, method: str, knobs: dict[str, Any], new_tokens: int, console: Console
) -> Outcome:
    """Patch, generate, measure, unpatch.

    Args:
        model: an unpatched causal language model.
        tokenizer: its tokenizer.
        trial: the prompt.
        method: name of a method.
        knobs: of the method.
        new_tokens: to generate.
        console: where bar and text go.
    """
    ids = trial.ids[None].to(model.device)
    with patched(model, method, **knobs):
        respond(model, tokenizer, ids[:, :64], 2, _CHUNK)  # warm up
        bar = Progress(
            TextColumn(f"{method:>14}  prefill"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        task = bar.add_task(method, total=ids.shape[1])
        streamer = TimedStreamer(tokenizer, console, bar, f"{method:>14}:")
        hook = model.register_forward_hook(
            lambda _, args, kwargs, __: bar.advance(task, (kwargs.get("input_ids") if not args else args[0]).shape[1]),
            with_kwargs=True,
        )
        try:
            bar.start()
            [answer] = respond(model, tokenizer, ids, new_tokens, _CHUNK, streamer)
        finally:
            hook.remove()
            bar.stop()
    return Outcome(method, answer, judge(answer.text, trial.key))


def table(outcomes: list[Outcome], trial: Passkey) -> Table:
    """One row per method."""
    shown = Table(
        title=f"Pass key {trial.key}, {trial.distance:,} tokens before the end of {len(trial.ids):,} tokens",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in ("method", "answer", "", "KV held", "dense KV", "prefill", "per token"):
        shown.add_column(column, justify="left" if column in ("method", "answer", "") else "right", no_wrap=True)
    for o in outcomes:
        cost = o.answer
        shown.add_row(
            o.method,
            " ".join(cost.text.split())[:12],
            "[green]right[/]" if o.right else "[red]wrong[/]",
            f"{cost.kv_bytes / 2**20:.1f} MiB",
            f"{cost.dense_kv_bytes / 2**20:.1f} MiB",
            f"{cost.prefill_s:.2f} s",
            "-" if cost.token_ms is None else f"{cost.token_ms:.0f} ms",
        )
    return shown
