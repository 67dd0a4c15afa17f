"""Where the tokens of a call stand: positions that a caller gives are honoured, or refused by name."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .attention import text_positions
from .cache.step import Step
from .context import Forward, Text
from .errors import UnsupportedError
from .models import takes_positions
from .plan import Plan


def find_texts(
    plan: Plan, kwargs: dict[str, Any], cached: bool, rows: int, columns: int, train: bool
) -> list[tuple[int, slice]]:
    """Row and columns of the texts that are packed into the rows of a call, in order; none where each row is one text.

    A row is packed where `position_ids` do not count up by one, as transformers has it: without `attention_mask` and
    without a cache. Elsewhere they are what the model rotates by, and no more.

    Args:
        plan: in force.
        kwargs: of the decoder's call.
        cached: it has a cache.
        rows: of the batch.
        columns: of the call.
        train: the patch is one to train with, so that texts which would run into each other are refused.

    Raises:
        UnsupportedError: positions that would be lost: of texts packed otherwise, and of images where positions are
            counted in the cache.
    """
    given, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if not isinstance(given, Tensor) or columns == 1:
        return []
    if given.ndim == 3 and plan.bounded and bool((given[-3:] != given[-3:-2]).any()):
        raise UnsupportedError(
            f"{plan.method}: expected text, whose position is one number; got position_ids {list(given.shape)} "
            "of images or video. Unpatch the model for them."
        )
    packs = mask is None and not cached
    if given.ndim != 2 or not (packs or plan.bounded or train):
        return []
    jumps = given[:, 1:] - given[:, :-1] != 1
    if mask is not None and mask.shape[1] >= columns:
        real = mask[:, -columns:].bool()
        jumps = jumps & real[:, 1:] & real[:, :-1]
    if not bool(jumps.any()):
        return []
    if not packs:
        raise UnsupportedError(
            "hf_longctx: expected position_ids that count up by one beside attention_mask or a cache; got packed "
            "sequences. Pass them without attention_mask and with use_cache=False, or one text per row."
        )
    found = []
    for row, marks in enumerate(jumps.expand(rows, -1).tolist()):
        ends = pairwise([0, *(i + 1 for i, mark in enumerate(marks) if mark), columns])
        found += [(row, slice(first, last)) for first, last in ends]
    return found


def _text(forward: Forward, row: int, columns: slice) -> Text:
    """A text as the call that it would be by itself."""
    step = Step.of(0, columns.stop - columns.start, forward.step.device, None, None)
    return Text(row, columns, replace(forward, step=step, reads=[], memo={}))


def place(forward: Forward, decoder: Any, kwargs: dict[str, Any], rows: int, texts: list[tuple[int, slice]]) -> None:
    """Tell the layers which texts are packed, and give the model the positions at which it shall rotate.

    These matter where the plan keeps them small, and where it looks at keys as they are rotated (scores, quantized
    keys): a padded row must be what it is alone. Learned positions are the model's own matter: families count them from
    different numbers. A mask of ones then keeps the model from reading packed texts into
    positions that jump; where there are some, they are apart already.
    """
    forward.texts = tuple(_text(forward, row, columns) for row, columns in texts)
    plan, given, step = forward.plan, kwargs.get("position_ids"), forward.step
    rotates = forward.facts.not_in_cache is None
    moved = takes_positions(decoder) and (plan.bounded or (rotates and plan.looks and step.ragged and given is None))
    if moved:
        pos = (text_positions(forward) if plan.bounded else step.pos_in_text).expand(rows, -1)
        kwargs["position_ids"] = pos if not isinstance(given, Tensor) or given.ndim == 2 else pos.expand_as(given)
    if (moved or forward.texts) and forward.cache is None and kwargs.get("attention_mask") is None:
        kwargs["attention_mask"] = torch.ones(rows, step.tokens, dtype=torch.bool, device=step.device)
