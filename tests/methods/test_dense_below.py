"""Before `dense_below` everything is read, and exactly as without a choice; from there on no room is kept for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_longctx as lc
from hf_longctx.kernels.types import Selection
from hf_longctx.models import inspect_model
from hf_longctx.patch import state_of

from ..integration.cases import BY_NAME
from .test_limits import TOLERANCE, WAYS, error

LLAMA = BY_NAME["llama"]
START = 32

SPARSE: dict[str, Callable[[int], Any]] = {
    "xattention": lambda below: lc.XAttention(stride=4, tau=0.2, block=8, dense_below=below),
    "quest": lambda below: lc.Quest(8, page=4, sink=0, dense_layers=0, dense_below=below),
}
methods = pytest.mark.parametrize("name", SPARSE)


@torch.no_grad()
def logits(method: Any, way: str, tokens: int) -> Tensor:
    return WAYS[way](lc.patch(LLAMA.make(), method), LLAMA.prompt(tokens))


@methods
@pytest.mark.parametrize("way", WAYS)
def test_a_text_up_to_there_is_read_bit_for_bit_as_a_dense_one(name: str, way: str) -> None:
    assert torch.equal(logits(SPARSE[name](START), way, START), logits(lc.Dense(), way, START))


@pytest.mark.parametrize(("name", "way"), [("xattention", "one_call"), ("quest", "chunks"), ("quest", "steps")])
def test_a_longer_text_is_read_densely_up_to_there_and_by_choice_beyond(name: str, way: str) -> None:
    got, chosen, dense = (logits(method, way, 60) for method in (SPARSE[name](START), SPARSE[name](0), lc.Dense()))
    assert error(got[:, :START], dense[:, :START]) < TOLERANCE
    assert error(got[:, START:], dense[:, START:]) > 1e-3
    assert error(got[:, :START], chosen[:, :START]) > 1e-3


@torch.no_grad()
def test_a_step_beyond_it_lists_no_more_blocks_than_without_it() -> None:
    widths: dict[int, list[int]] = {}
    for below in (0, START):
        model = lc.patch(LLAMA.make(), SPARSE["quest"](below))
        seen = widths[below] = []

        def watch(layer: int, group: Any, selector: Any, pos: Tensor, read: Selection, seen: list[int] = seen) -> None:
            seen.append(read.ids.shape[-1])

        state = state_of(model)
        assert state is not None
        state.watch = watch
        cache = model(LLAMA.prompt(START + 8)).past_key_values
        model(LLAMA.prompt(1), past_key_values=cache)
    assert widths[START] == widths[0]
    assert len(widths[0]) == LLAMA.layers


@methods
@torch.no_grad()
def test_a_padded_row_is_what_it_is_alone(name: str) -> None:
    """One row is beyond, the other is not."""
    model = lc.patch(LLAMA.make(), SPARSE[name](START))
    ids, mask = LLAMA.prompt(44, rows=2), torch.ones(2, 44, dtype=torch.int64)
    mask[1, :24] = 0
    cache = model(ids, attention_mask=mask).past_key_values
    mask = torch.cat((mask, mask[:, -1:]), 1)
    got = model(ids[:, :1], attention_mask=mask, past_key_values=cache).logits
    for row, first in ((0, 0), (1, 24)):
        alone = model(ids[row : row + 1, first:]).past_key_values
        expected = model(ids[row : row + 1, :1], past_key_values=alone).logits
        assert error(got[row : row + 1], expected) < TOLERANCE


def test_a_short_prompt_is_read_densely_by_default() -> None:
    for layer in lc.XAttention().plan(inspect_model(LLAMA.make())).layers:
        selector = layer.groups[0].policy.prefill
        assert selector is not None
        assert selector.dense_below == 4096
