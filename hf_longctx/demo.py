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

from . import patched, report, supports
from .evals.passkey import Passkey, judge

_CHUNK = 256


@dataclass(frozen=True)
class Outcome:
    """One method on one prompt.

    Attributes:
        method: its name.
        answer: what the model wrote.
        right: whether that was the key.
        kv_bytes: held at the end, counted from the cache's tensors.
        dense_kv_bytes: what all tokens in all heads would take.
        prefill_s: from the call to the first new token.
        token_ms: mean of the tokens after that.
    """

    method: str
    answer: str
    right: bool
    kv_bytes: int
    dense_kv_bytes: int
    prefill_s: float
    token_ms: float


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
    answers = supports(model)
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
    greedy = {"do_sample": False, "pad_token_id": tokenizer.eos_token_id, "return_dict_in_generate": True}
    with patched(model, method, **knobs):
        model.generate(ids[:, :64], attention_mask=torch.ones_like(ids[:, :64]), max_new_tokens=2, **greedy)  # warm up
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
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                prefill_chunk_size=_CHUNK,
                streamer=streamer,
                **greedy,
            )
        finally:
            hook.remove()
            bar.stop()
        seen = report(model)
    prompt, first, *rest = streamer.times
    answer = tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True)
    token_ms = 1000 * (rest[-1] - first) / len(rest) if rest else float("nan")
    right = judge(answer, trial.key)
    return Outcome(method, answer, right, seen.kv_bytes, seen.dense_kv_bytes, first - prompt, token_ms)


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
        shown.add_row(
            o.method,
            " ".join(o.answer.split())[:12],
            "[green]right[/]" if o.right else "[red]wrong[/]",
            f"{o.kv_bytes / 2**20:.1f} MiB",
            f"{o.dense_kv_bytes / 2**20:.1f} MiB",
            f"{o.prefill_s:.2f} s",
            f"{o.token_ms:.0f} ms",
        )
    return shown
