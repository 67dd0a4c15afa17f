"""Calls of every operation, small ones, out of the cases of the tests that say what it computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_longctx.kernels import experts, linear, ops, packing
from hf_longctx.kernels.ops import Logits, Visibility

from . import (
    deltas,
    prefills,
    test_compiled_antidiagonal,
    test_compiled_attend,
    test_compiled_select,
    test_compiled_store,
    test_count,
    test_experts,
    test_fill,
    test_layers,
    test_moves,
    test_recent,
    test_step,
    weights,
)

BF16, F32 = torch.bfloat16, torch.float32


def calls(device: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Names and arguments, on a device, in dtypes that its backends take."""
    yield from _attention(device)
    yield from _choosing(device)
    yield from _storing(device)
    yield from _layers(device)
    yield from _products(device)


def _attention(device: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    plain = prefills.Case((2, 2, 2, 40, 60, 64), ends=(59, 30))
    for case in (
        plain,
        replace(plain, sink=4, window=9, bits=4),
        replace(plain, sink_logits=True, softcap=2.0, slopes=True),
        replace(plain, lists=(8, 8, "some"), pages=True, share="kv_head"),
        replace(plain, lap=64, sink=4, window=20, rotated=16),
    ):
        yield "attend_blocks", prefills.made(case, device)
    few = test_compiled_attend.Case((2, 2, 4, 2, 64, 64), ends=(63, 20))
    for one in (few, replace(few, bits=8), replace(few, chosen=(3, 8), pages=True), test_compiled_attend.OTHERS[1]):
        if device == "cpu" or one.dtype == BF16:
            yield "attend_pages", test_compiled_attend.made(one, device)
    q, k, v, *rest = prefills.made(replace(plain, bits=8, sink=4, window=9), device)
    heads, out = torch.tensor([3, 0, 5, 1], dtype=torch.int32, device=device), q.new_zeros(2, 8, 40, 64)
    yield "attend_heads", (torch.cat((q, q), 1), k, v, *rest, heads, out)
    read = prefills.made(replace(plain, lists=(8, 8, "some"), pages=True, share="kv_head"), device)
    yield "attend_mass", (*read, 7)
    drawn, far, near = test_recent.drawn(torch.Generator().manual_seed(0), 2, 2, 1, 40, 64, BF16, device)
    see = Visibility(q_pos=torch.tensor([[39], [12]], device=device))
    places = torch.arange(40, device=device)[None]
    yield "attend_recent", (drawn, *far, *near, Logits(0.1), see, places, 9)
    yield "step_recent", test_recent.stepped(64, BF16, 4, (1499, 70), 64, 3, device)
    for layer in (test_step.BASE, test_step.MIXED, replace(test_step.MIXED, bits=4)):
        yield "attend_layer", test_step.made(layer, device)


def _choosing(device: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    scored = test_compiled_select.Scored((2, 2, 4, 1, 30, 64))
    for case in (replace(scored, share="all", subs=4), replace(scored, share="q_head", vectors=1), scored):
        yield "score_pages", _on(device, test_compiled_select.summaries(case))
    tiled = test_compiled_antidiagonal.tiles(test_compiled_antidiagonal.Tiled(spans=((0, 200), (100, 190))))
    yield "score_antidiagonal", (*_on(device, tiled), "")
    scores = torch.rand(2, 2, 3, 12, generator=torch.Generator().manual_seed(0)).to(device)
    low, high = (torch.tensor([x], device=device) for x in ((3, 5, 9), (4, 6, 11)))
    yield "pick_blocks", (scores, low, high, 1, 3, None, 3)
    yield "pick_blocks", (scores, low, high, 1, None, torch.tensor([0.5, 0.9], device=device), 3)
    yield "count_blocks", test_count.made(test_count.CASES[1], device)


def _storing(device: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    x = test_layers.random(2, 2, 9, 16).to(device, BF16)
    for bits in (4, 8):
        yield "encode_kv", (x, bits)
        yield "decode_kv", (ops.encode_kv(x, bits),)
    yield "append", (x.float(), x[:, :, :3], 4, None)
    slots, written = torch.tensor([[1, 0], [3, 8]]), torch.tensor([[True, True], [False, True]])
    yield "append", (x.clone(), x[:, :, :2], slots.to(device), written.to(device))
    for case in (
        test_compiled_store.CASES[0],
        replace(test_compiled_store.BASE, pos=((62, 63, 64),), first=62, sink=4, ring=60),
        replace(test_compiled_store.BASE, pos=((37,), (-1,)), sizes=(2, 2, 64, 64, 128), bits=(8, 4), sub=8),
    ):
        yield "append_pages", test_compiled_store.on(device, test_compiled_store.made(case))
    for filled in (test_fill.CASES[0], replace(test_fill.PACKED, heads=(2, 0))):
        group, more = test_fill.there(device, *test_fill.made(filled))
        yield "fill_pages", ([group], *more.values())
    lengths = torch.tensor([300, 41], device=device)
    for packed in ((0, 0), (8, 4)) if device == "cpu" else ():  # elsewhere addresses are read, which no graph sees
        scene = test_moves.Scene(test_moves.Case(bits=packed, segments=(8, 7)), device)
        ids = test_moves.draw_ids(scene.case, 3, 12, [300, 41], 0)
        yield "bring_blocks", (*scene.first, ids, lengths, scene.held, scene.counts, test_moves.PLACES)
        for out in (False, True):
            yield "copy_blocks", (*scene.first, torch.tensor([2]), torch.tensor([5]), 4, test_moves.PLACES, out)


def _layers(device: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    x, weight = (test_layers.random(*shape).to(device, BF16) for shape in ((2, 3, 64), (64,)))
    yield "rms_norm", (x, weight, 1e-5, 0.0, True, None)
    yield "rms_norm", (x, x[0], 1e-5, 0.0, True, torch.tensor([2, 0], device=device))
    yield "rms_norm", (x, weight.float(), 1e-5, 0.0, True, None)
    yield "gated", (x, x.flip(0))
    turned, delta = x.view(2, 3, 4, 16), torch.tensor([[3, -1, 0, 8]], device=device)
    yield "rotate", (turned, delta, torch.rand(6, device=device), True)
    for case in (test_layers.Case(test_layers.rotate_whole), test_layers.CASES[-1]):
        yield "rotate_heads", test_layers.heads(case, BF16, device)
    many = [test_layers.random(n, 64).to(device, BF16) for n in (24, 8)]
    yield "project", (x[0], many, [None, many[1][:, 0].contiguous()])
    yield "project_gated", (x[0], many[0], many[0].flip(0))


def _products(device: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    x, base, bits, scales, slots = deltas.make(deltas.Case(5, 96, 64, 3, 3, by_row=True), BF16, device=device)
    weight = test_layers.random(64, 96).to(device, BF16)
    yield "delta_linear", (x, base, bits, scales, slots[:, None])
    yield "linear_with_delta", (x, weight, weight[:, 0].contiguous(), bits, scales, slots[:, None])
    yield "linears_with_delta", (x, [weight] * 2, [None, None], [bits] * 2, [scales] * 2, slots[:, None])
    x, base, bits, scales, slots = deltas.make(deltas.Case(4, 256, 64, 3, 1), BF16, device=device)
    weight = test_layers.random(64, 256).to(device, BF16)
    yield "linears_with_delta", (x, [weight] * 2, [None, None], [bits] * 2, [scales] * 2, slots[:, None])
    yield "linear_with_delta", (x, weight, None, bits, scales, slots[:, None])
    codes, worth = torch.ones(70, 256, dtype=torch.int8, device=device), torch.rand(70, 1, device=device)
    yield "linear_of_rows", (x, [weight, codes], [None, worth], [0, 1, 1, 0], 72)
    wide = test_layers.random(5, 128).to(device, BF16)
    yield "quantize_tokens", (wide,)
    yield "quantize_norm", (wide, wide[0].contiguous(), 1e-5, 0.0, True)
    yield "quantize_gated", (wide, wide.flip(0))
    tokens = weights.moved(weights.random_tokens(5, 128), device)
    for form in weights.FORMS:
        packed = weights.moved(packing.pack(weights.random_codes(form, 70, 128)), device)
        bias = torch.rand(70, device=device)
        yield "w4a8_linear", (tokens, packed, bias, BF16)
        yield "w4a8_linears", (tokens, [packed, packed], [bias, None], BF16)
        gate, up = (test_layers.random(3, 128).to(device, BF16) for _ in range(2))
        yield "w4a8_linears_of", (gate[:1], None, [packed, packed], [bias, None])
        yield "w4a8_linears_of", (gate, up, [packed], [None])
    yield from _experts(device)


def _experts(device: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    tokens, ids = weights.moved(weights.random_tokens(5, 128), device), test_experts.drawn(10, 4).to(device)
    yield "sort_experts", (ids, 4)
    by = experts.sort_experts(ids, 4)
    for form in weights.FORMS:
        yield "w4a8_experts", (tokens, test_experts.there(test_experts.packed(form, 4, 70, 128), device), by, 2, BF16)
    yield "combine_experts", (test_layers.random(10, 64).to(device, BF16), by, torch.rand(5, 2, device=device))


def _on(device: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.to(device) if isinstance(x, Tensor) else x for x in arguments)


def copied(x: Any) -> Any:
    """Arguments in memory of their own."""
    if isinstance(x, ops.HostBlocks):
        return replace(x, segments=[segment.clone() for segment in x.segments])
    return x if isinstance(x, linear.PackedWeight | linear.Tokens) else test_step.copied(x)
