"""Let a patched model write, or follow what is to be written, and note where its heads look for each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..models import CACHE
from .scores import Head
from .tap import Gaze, tapped


@dataclass(frozen=True)
class Written:
    """What one prompt was answered, and where each head looked.

    Attributes:
        tokens: n, without what ends an answer.
        foretold: n, the model's own choice at each place; the same where it wrote by itself.
        places: by head, `[n]`, int64, place in the prompt (or after it) with most attention as each was written.
        shares: by head, `[n]`, float32, attention of the strongest keys.
    """

    tokens: list[int]
    foretold: list[int]
    places: dict[Head, Tensor]
    shares: dict[Head, Tensor]


def freely(
    model: Any, tokenizer: Any, prompts: Sequence[Tensor], new_tokens: int, chunk: int, top: int = 4
) -> list[Written]:
    """Answer prompts together, greedily; an answer ends with its first line.

    Args:
        model: patched with `dense`.
        tokenizer: its tokenizer.
        prompts: each `[T]`, int64; lengths may differ.
        new_tokens: to write at most.
        chunk: tokens per call of the prefill.
        top: as in `Gaze`.
    """
    ids, mask = _padded(prompts, model.device)
    gaze = Gaze(1, top)
    with tapped(model, gaze), torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            prefill_chunk_size=chunk,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,  # as the checkpoint may have another
            pad_token_id=tokenizer.pad_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id,
        )
    fresh = out[:, ids.shape[1] :].tolist()
    seen = gaze.last(len(fresh[0]))
    stops = _stops(model)
    found = []
    for row, tokens in enumerate(fresh):
        count = _answer(tokens, stops, tokenizer)
        places, shares = ({head: both[i][row, :count] for head, both in seen.items()} for i in range(2))
        found.append(Written(tokens[:count], tokens[:count], places, shares))
    return found


def following(
    model: Any, prompts: Sequence[Tensor], answers: Sequence[Sequence[int]], chunk: int, top: int = 4
) -> list[Written]:
    """Teacher forcing: read each prompt and its answer, and look as if the answer were being written.

    Args:
        model: patched with `dense`.
        prompts: each `[T]`, int64; lengths may differ.
        answers: tokens for each prompt, at least one.
        chunk: tokens per call of the prefill.
        top: as in `Gaze`.
    """
    whole = [torch.cat((p, torch.tensor(a[:-1], dtype=p.dtype))) for p, a in zip(prompts, answers, strict=True)]
    ids, mask = _padded(whole, model.device)
    last = max(map(len, answers))
    gaze = Gaze(last, top)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    cuts = [*range(0, ids.shape[1] - last, chunk), ids.shape[1] - last, ids.shape[1]]
    cache = None
    with tapped(model, gaze), torch.no_grad():
        for start, stop in pairwise(cuts):
            out = model(
                input_ids=ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=places[:, start:stop],
                use_cache=True,
                logits_to_keep=last if stop == ids.shape[1] else 1,
                **{CACHE: cache},
            )
            cache = getattr(out, CACHE)
    chosen = out.logits.argmax(-1).cpu()
    seen = gaze.last(1)
    found = []
    for row, answer in enumerate(answers):
        mine = slice(last - len(answer), None)
        at, shares = ({head: both[i][row, mine] for head, both in seen.items()} for i in range(2))
        found.append(Written(list(answer), chosen[row, mine].tolist(), at, shares))
    return found


def _padded(rows: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of one length, padded on the left, and their mask."""
    width = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(width) >= width - lengths[:, None]
    return ids.to(device), mask.long().to(device)


def _stops(model: Any) -> set[int]:
    """Tokens that end an answer, as the model's generation configuration says."""
    ends = model.generation_config.eos_token_id
    return set() if ends is None else set(ends if isinstance(ends, list) else [ends])


def _answer(tokens: list[int], stops: set[int], tokenizer: Any) -> int:
    """Tokens before the end of a sequence, or of the first line with words in it."""
    for count, token in enumerate(tokens):
        if token in stops:
            return count
        if "\n" in tokenizer.decode([token]) and tokenizer.decode(tokens[:count]).strip():
            return count
    return len(tokens)
