"""Writing tokens into a store: by a first slot, by a slot per token, and where `written` says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_longctx.kernels import ops
from hf_longctx.kernels.dispatch import use_backend


def store_and_fresh(rows: int, slots: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, slots, 3, generator=made), torch.randn(rows, 2, tokens, 3, generator=made)


@given(st.integers(1, 3), st.integers(0, 9), st.integers(1, 9), st.integers(0, 9))
def test_from_a_first_slot_on(rows: int, first: int, tokens: int, seed: int) -> None:
    store, fresh = store_and_fresh(rows, 20, tokens, seed)
    before = store.clone()
    ops.append(store, fresh, first)
    assert torch.equal(store[:, :, first : first + tokens], fresh)
    assert torch.equal(store[:, :, :first], before[:, :, :first])
    assert torch.equal(store[:, :, first + tokens :], before[:, :, first + tokens :])


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


@st.composite
def decode_calls(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `append_pages`: each row's tokens follow each other from some position on, some are not written."""
    rows, tokens, slots = draw(st.integers(1, 3)), draw(st.integers(1, 8)), 24
    sink, bits = draw(st.integers(0, 3)), draw(st.sampled_from([None, 4, 8]))
    ring = draw(st.one_of(st.none(), st.integers(tokens, slots - sink)))
    alike = draw(st.booleans())
    pos = torch.full((1 if alike else rows, tokens), -1)
    for row in pos:
        count = tokens if alike else draw(st.integers(0, tokens))
        first = draw(st.integers(0, slots - tokens if ring is None else 90))
        row[:count] = torch.arange(first, first + count)
    made = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    old, fresh = (torch.randn(2, rows, 2, n, 6, generator=made) for n in (slots, tokens))
    stores = [x if bits is None else ops.encode_kv(x, bits) for x in old]
    sub = draw(st.integers(1, 9))
    bounds = torch.full((rows, 2, -(-slots // sub), 2, 6), 7.0) if ring is None and draw(st.booleans()) else None
    return {
        "k_store": stores[0],
        "v_store": stores[1],
        "k": fresh[0],
        "v": fresh[1],
        "pos": pos,
        "sink": sink,
        "ring": ring,
        "bounds": bounds,
        "sub": sub,
        "first": int(pos[0, 0]) if alike and draw(st.booleans()) else None,
    }


def values(x: torch.Tensor | ops.Packed) -> torch.Tensor:
    return (x if isinstance(x, torch.Tensor) else ops.decode_kv(x)).clone()


@settings(max_examples=150)
@given(decode_calls())
def test_tokens_of_a_decode_call(call: dict[str, Any]) -> None:
    stores, fresh = [call["k_store"], call["v_store"]], [call["k"], call["v"]]
    expected = [values(x) for x in stores]
    bounds, sub = None if call["bounds"] is None else call["bounds"].clone(), call["sub"]
    for row in range(len(fresh[0])):
        written = [(t, p) for t, p in enumerate(call["pos"][row % len(call["pos"])].tolist()) if p >= 0]
        for t, p in written:
            slot = p if call["ring"] is None or p < call["sink"] else call["sink"] + (p - call["sink"]) % call["ring"]
            for want, x, store in zip(expected, fresh, stores, strict=True):
                kept = x if isinstance(store, torch.Tensor) else ops.decode_kv(ops.encode_kv(x, store.bits))
                want[row, :, slot] = kept[row, :, t]
        for entry in {p // sub for _, p in written} if bounds is not None else ():
            keys = expected[0][row, :, entry * sub : min((entry + 1) * sub, written[-1][1] + 1)]
            bounds[row, :, entry] = torch.stack((keys.amin(1), keys.amax(1)), 1)
    with use_backend("reference"):
        ops.append_pages(**call)
    for want, store in zip(expected, stores, strict=True):
        assert torch.equal(values(store), want)
    assert bounds is None or torch.equal(call["bounds"], bounds)


def test_a_decode_call_casts_and_cuts_the_graph() -> None:
    stores = [torch.zeros(1, 2, 4, 4, dtype=torch.bfloat16), ops.encode_kv(torch.zeros(1, 2, 4, 4).bfloat16(), 8)]
    k, v = (torch.randn(1, 2, 2, 4, requires_grad=True) for _ in range(2))
    ops.append_pages(*stores, k, v, torch.tensor([[1, 2]]), 0, None, None, 1)
    assert torch.equal(values(stores[0])[:, :, 1:3], k.detach().bfloat16())
    assert torch.equal(values(stores[1])[:, :, 1:3], ops.decode_kv(ops.encode_kv(v.detach().bfloat16(), 8)))
    assert not stores[0].requires_grad
