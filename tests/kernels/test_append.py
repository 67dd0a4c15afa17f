"""Writing tokens into a store: by a first slot, by a slot per token, and where `written` says so."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_longctx.kernels import ops


def store_and_fresh(rows: int, slots: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, slots, 3, generator=made), torch.randn(rows, 2, tokens, 3, generator=made)


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(0, 9), st.integers(1, 9), st.integers(0, 9))
def test_from_a_first_slot_on(rows: int, first: int, tokens: int, seed: int) -> None:
    store, fresh = store_and_fresh(rows, 20, tokens, seed)
    before = store.clone()
    ops.append(store, fresh, first)
    assert torch.equal(store[:, :, first : first + tokens], fresh)
    assert torch.equal(store[:, :, :first], before[:, :, :first])
    assert torch.equal(store[:, :, first + tokens :], before[:, :, first + tokens :])


@settings(deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(1, 6), st.booleans())
def test_a_slot_per_token(data: st.DataObject, rows: int, tokens: int, all_written: bool) -> None:
    store, fresh = store_and_fresh(rows, 8, tokens, 0)
    slots = torch.tensor([data.draw(st.permutations(range(8)))[:tokens] for _ in range(rows)])
    flags = st.lists(st.booleans(), min_size=tokens, max_size=tokens)
    written = None if all_written else torch.tensor([data.draw(flags) for _ in range(rows)])
    expected = store.clone()
    for row in range(rows):
        for t in range(tokens):
            if written is None or written[row, t]:
                expected[row, :, slots[row, t]] = fresh[row, :, t]
    ops.append(store, fresh, slots, written)
    assert torch.equal(store, expected)


@pytest.mark.parametrize("slots", [1, torch.tensor([[1, 0]])])
def test_casts_and_cuts_the_graph(slots: torch.Tensor | int) -> None:
    store, fresh = torch.zeros(1, 2, 4, 3, dtype=torch.bfloat16), torch.randn(1, 2, 2, 3, requires_grad=True)
    ops.append(store, fresh, slots)
    order = [1, 2] if isinstance(slots, int) else [1, 0]
    assert torch.equal(store[:, :, order], fresh.detach().bfloat16())
    assert not store.requires_grad
