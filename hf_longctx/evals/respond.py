"""Prompts in, answers and costs out, under the method that the model is patched with."""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class Answer:
    """What came back for one prompt, and what it took.

    Attributes:
        text: without special tokens.
        kv_bytes: held at the end for this prompt, counted from the cache's tensors.
        dense_kv_bytes: what all its tokens in all heads would take.
        density: share of the keys that was read, if the method measures it.
        prefill_s: from the call to the first new token, of the whole batch.
        token_ms: mean of the tokens after that, of the whole batch; None if there are none.
    """

    text: str
    kv_bytes: int
    dense_kv_bytes: int
    density: float | None
    prefill_s: float
    token_ms: float | None


class Clock(Protocol):
    """A streamer that notes the time of the prompt and of every new token."""

    times: list[float]


class Ticks(BaseStreamer):
    """The plain clock, for batches too.

    `generate` copies every token to the host before it calls a streamer, so the device has finished it by then.
    """

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def greedy(model: Any, ids: torch.Tensor, most: int, least: int, clock: Clock, **extra: Any) -> Any:
    """What `generate` returns, as a dictionary, greedily whatever the model's own settings say.

    Args:
        model: patched or not.
        ids: `[B, T]`, int64, on the model's device; nothing is padding.
        most: new tokens.
        least: before so many new tokens nothing ends an answer.
        clock: told of the prompt and of every new token.
        extra: more arguments.
    """
    eos = model.generation_config.eos_token_id
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=most,
        min_new_tokens=least,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,  # some checkpoints come with another, which would change which key is written
        pad_token_id=(eos[0] if isinstance(eos, list) else eos) or 0,
        streamer=clock,
        return_dict_in_generate=True,
        **deepcopy(extra),  # transformers 5.17 takes keys out of a `cache_config`, and a second call would miss them
    )


def respond(
    model: Any,
    tokenizer: Any,
    prompts: torch.Tensor,
    new_tokens: int,
    chunk: int,
    clock: Clock | None = None,
    least: int = 0,
) -> list[Answer]:
    """Answer prompts of one length together, greedily, and measure.

    Args:
        model: a patched causal language model.
        tokenizer: its tokenizer.
        prompts: `[B, T]`, int64.
        new_tokens: to generate at most: an end-of-sequence token ends an answer.
        chunk: tokens per call of the prefill.
        clock: a streamer of the caller's, for one prompt; None takes one that shows nothing.
        least: before so many new tokens nothing ends an answer.

    Returns:
        An answer for each prompt.
    """
    from .. import report

    clock = clock or Ticks()
    ids = prompts.to(model.device)
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    out = greedy(model, ids, new_tokens, least, clock, prefill_chunk_size=chunk)
    seen, rows = report(model), len(ids)
    prompt, first, *rest = clock.times
    token_ms = 1000 * (rest[-1] - first) / len(rest) if rest else None
    costs = (seen.kv_bytes // rows, seen.dense_kv_bytes // rows, getattr(seen, "density", None), first - prompt)
    texts = tokenizer.batch_decode(out.sequences[:, ids.shape[1] :], skip_special_tokens=True)
    return [Answer(text, *costs, token_ms) for text in texts]
