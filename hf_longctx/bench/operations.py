"""Operations that can be timed: their arguments at any size, and when a backend's result is right.

The same makers serve the clock and, on the small sizes of `SMALL`, the check before it and the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..kernels import ops
from ..kernels.dispatch import use_backend
from ..kernels.ops import Logits, Packed, Selection, Visibility

PAGE, BLOCK, STRIDE = 16, 128, 16
"""Tokens of a page of decode, of a block of a prompt, and of a tile that is scored."""

LONG = 2100
"""Tokens from which on it does not depend on them which backends are asked."""


@dataclass(frozen=True)
class Size:
    """How large a call is.

    Attributes:
        tokens: stored, or of the prompt.
        batch: rows.
        q_heads: query heads.
        kv_heads: KV heads.
        dim: channels of a head.
        bits: of stored keys and values: 16 or 32 as the dtype has them, 8 or 4 packed.
        budget: tokens that are chosen of them.
        window: tokens of the window of a streaming head; its sinks are 128, or an eighth of a shorter window.
        dtype: of queries, and of what is stored unpacked.
    """

    tokens: int
    batch: int = 1
    q_heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    bits: int = 16
    budget: int = 4096
    window: int = 1024
    dtype: torch.dtype = torch.bfloat16

    @property
    def packed(self) -> bool:
        """Keys and values are quantized."""
        return self.bits < 16

    @property
    def sink(self) -> int:
        """First tokens that a streaming head reads."""
        return min(128, self.window // 8)

    @property
    def stored_bytes(self) -> float:
        """Of a token's key and value in all KV heads of all rows, scales and zeros included."""
        each = self.dim * self.bits / 8 + 4 if self.packed else self.dim * self.dtype.itemsize
        return 2 * self.batch * self.kv_heads * each


@dataclass(frozen=True)
class Operation:
    """One that can be timed.

    Attributes:
        name: on the command line.
        op: the operation of `kernels.ops`.
        does: in a few words.
        make: arguments of a size, on the CPU.
        moved: bytes that must be read and written at least; None: products bound it.
        dense: scaled dot products of torch do the same, over all keys: the baseline.
        packs: takes keys and values in few bits.
    """

    name: str
    op: str
    does: str
    make: Callable[[Size, torch.Generator], tuple[Any, ...]]
    moved: Callable[[Size], float] | None
    dense: bool = False
    packs: bool = False

    def run(self, arguments: tuple[Any, ...]) -> Any:
        """Call it."""
        return getattr(ops, self.op)(*arguments)


def _heads(size: Size, made: torch.Generator, count: int, tokens: int) -> Tensor:
    """Random heads as a model makes them: those of a token side by side."""
    x = torch.randn(size.batch, tokens, count, size.dim, generator=made, device=made.device)
    return x.to(size.dtype).transpose(1, 2)


def _stored(size: Size, made: torch.Generator) -> list[Tensor | Packed]:
    """Keys and values as a store has them: a head's tokens side by side."""
    kept = [_heads(size, made, size.kv_heads, size.tokens).contiguous() for _ in "kv"]
    return [ops.encode_kv(x, size.bits) if size.packed else x for x in kept]


def _attend(size: Size, made: torch.Generator) -> tuple[Any, ...]:
    q = _heads(size, made, size.q_heads, 1)
    return q, *_stored(size, made), Logits(size.dim**-0.5), Visibility(), None, None


def _attend_chosen(size: Size, made: torch.Generator) -> tuple[Any, ...]:
    pages, count = -(-size.tokens // PAGE), min(size.budget, size.tokens) // PAGE
    rank = torch.rand(size.batch, size.kv_heads, 1, pages, generator=made, device=made.device)
    ids = rank.argsort(-1)[..., :count].sort(-1).values.int()
    return *_attend(size, made)[:6], Selection(ids, PAGE, 1)


def _prefill(size: Size, made: torch.Generator) -> tuple[Any, ...]:
    q, k, v = (_heads(size, made, n, size.tokens) for n in (size.q_heads, size.kv_heads, size.kv_heads))
    return q, k, v, Logits(size.dim**-0.5), Visibility(), None, None


def _prefill_window(size: Size, made: torch.Generator) -> tuple[Any, ...]:
    return *_prefill(size, made)[:4], Visibility(size.sink, size.window), None, None


def _prefill_chosen(size: Size, made: torch.Generator) -> tuple[Any, ...]:
    """Each block of queries reads the first block, its own, and random others, a budget's worth together."""
    blocks = -(-size.tokens // BLOCK)
    count = min(max(2, size.budget // BLOCK), blocks)
    n = torch.arange(blocks, device=made.device)
    rank = torch.rand(size.batch, size.q_heads, blocks, blocks, generator=made, device=made.device)
    rank.masked_fill_(n > n[:, None], -1.0)
    rank[..., 0] = 2.0
    rank.diagonal(dim1=-2, dim2=-1).fill_(2.0)
    found = rank.topk(count, -1)
    ids = found.indices.masked_fill(found.values < 0, blocks).sort(-1).values
    ids = ids.masked_fill(ids == blocks, -1).int()
    q_pos = torch.arange(size.tokens, device=made.device)[None]
    return *_prefill(size, made)[:4], Visibility(q_pos=q_pos), None, Selection(ids, BLOCK, BLOCK)


def _score(size: Size, made: torch.Generator) -> tuple[Any, ...]:
    pages = -(-size.tokens // PAGE)
    two = torch.randn(size.batch, size.kv_heads, pages, 2, size.dim, generator=made, device=made.device)
    bounds = torch.stack((two.amin(3), two.amax(3)), 3).to(size.dtype)
    return _heads(size, made, size.q_heads, 1), bounds, 1, "kv_head"


def _pick(size: Size, made: torch.Generator) -> tuple[Any, ...]:
    pages = -(-size.tokens // PAGE)
    scores = torch.randn(size.batch, size.kv_heads, 1, pages, generator=made, device=made.device)
    high = torch.full((1, 1), pages - 1, device=made.device)
    return scores, high - 1, high, 1, min(size.budget // PAGE, pages), None, 2


def _antidiagonal(size: Size, made: torch.Generator) -> tuple[Any, ...]:
    tokens = -(-size.tokens // BLOCK) * BLOCK
    whole = replace(size, tokens=tokens)
    q, k = (_heads(whole, made, n, tokens) for n in (size.q_heads, size.kv_heads))
    return q, k, torch.arange(tokens, device=made.device)[None], BLOCK, STRIDE, size.dim**-0.5, True


def _append(size: Size, made: torch.Generator) -> tuple[Any, ...]:
    """The last token of each row, and the bounds of its page."""
    stores, fresh = _stored(size, made), [_heads(size, made, size.kv_heads, 1) for _ in "kv"]
    shape = (size.batch, size.kv_heads, -(-size.tokens // PAGE), 2, size.dim)
    bounds = torch.full(shape, 7.0, dtype=size.dtype, device=made.device)
    pos = torch.full((1, 1), size.tokens - 1, device=made.device)
    return *stores, *fresh, pos, 0, None, bounds, PAGE, size.tokens - 1


def _all_keys(size: Size) -> float:
    return size.stored_bytes * size.tokens


def _chosen_keys(size: Size) -> float:
    return size.stored_bytes * min(size.budget, size.tokens)


def _bounds(size: Size) -> float:
    return 2 * size.batch * size.kv_heads * -(-size.tokens // PAGE) * size.dim * size.dtype.itemsize


def _scores(size: Size) -> float:
    return 4 * size.batch * size.kv_heads * -(-size.tokens // PAGE)


def _page(size: Size) -> float:
    """A token that is read and written, and the keys of its page."""
    fresh = 2 * size.batch * size.kv_heads * size.dim * size.dtype.itemsize
    return fresh + size.stored_bytes * (1 + PAGE / 2) + fresh


OPERATIONS = {
    one.name: one
    for one in (
        Operation("attend", "attend_pages", "decode over all keys", _attend, _all_keys, True, True),
        Operation("attend_chosen", "attend_pages", "decode over pages", _attend_chosen, _chosen_keys, True, True),
        Operation("prefill", "attend_blocks", "a causal prompt", _prefill, None, True),
        Operation("prefill_window", "attend_blocks", "sinks and a window of it", _prefill_window, None, True),
        Operation("prefill_chosen", "attend_blocks", "blocks of it", _prefill_chosen, None, True),
        Operation("score", "score_pages", "bounds of all pages", _score, _bounds),
        Operation("pick", "pick_blocks", "the best pages", _pick, _scores),
        Operation("antidiagonal", "score_antidiagonal", "blocks of a prompt", _antidiagonal, None),
        Operation("append", "append_pages", "a token and its page's bounds", _append, _page, packs=True),
    )
}
"""By name. Those that `packs` are checked and timed in 8 and 4 bits too."""

_EXACT = ("pick_blocks", "append_pages")
"""Operations that give the same to the last bit on every backend."""

_BASE = Size(tokens=300, batch=2, q_heads=8, kv_heads=2, dim=64, budget=64, window=80)
_SIZES = (_BASE, replace(_BASE, tokens=129, batch=1, q_heads=4, dim=128), replace(_BASE, dtype=torch.float16))
_LONGER = {"prefill": (replace(_BASE, tokens=LONG, batch=1, dim=128),)}
SMALL = {
    name: (*_SIZES, *(replace(_BASE, tokens=304, bits=bits) for bits in (8, 4) if one.packs), *_LONGER.get(name, ()))
    for name, one in OPERATIONS.items()
}
"""Sizes on which every operation is checked; each backend that is timed takes some of them."""


def arguments(one: Operation, size: Size, device: torch.device, seed: int = 0) -> tuple[Any, ...]:
    """Random arguments of a size, made on the device."""
    return one.make(size, torch.Generator(device).manual_seed(seed))


def difference(one: Operation, size: Size, run: Callable[[tuple[Any, ...]], Any], device: torch.device) -> str | None:
    """What differs between a result and the definition, beyond rounding; None: nothing.

    Args:
        one: the operation.
        size: a small one.
        run: the call that is checked; it may write into its arguments.
        device: on which it runs.
    """
    given = arguments(one, size, device)
    mine, same = deepcopy(given), deepcopy(given)
    found = list(_results(run(mine), mine))
    with use_backend("reference"):
        rounded = list(_results(one.run(same), same))
        exact = rounded if one.op in _EXACT else [one.run(_wide(given))]
    for place, (got, like, right) in enumerate(zip(found, rounded, exact, strict=True)):
        said = _differs(one, size, got, like, right)
        if said is not None:
            return f"{one.name}, {size.tokens} tokens, {size.bits} bits, {size.dtype}: result {place} {said}"
    return None


def _results(result: Any, given: tuple[Any, ...]) -> Iterator[Tensor]:
    """What a call gave, or, where it gives nothing, what it may have written."""
    if result is not None:
        yield result
        return
    for x in given:
        yield from (x,) if isinstance(x, Tensor) else x.tensors if isinstance(x, Packed) else ()


def _wide(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same values in float64."""
    wide = (ops.decode_kv(x) if isinstance(x, Packed) else x for x in given)
    return tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in wide)


def _differs(one: Operation, size: Size, got: Tensor, like: Tensor, right: Tensor) -> str | None:
    if got.shape != like.shape or got.dtype != like.dtype:
        return f"is {tuple(got.shape)} of {got.dtype}, not {tuple(like.shape)} of {like.dtype}"
    if one.op in _EXACT:
        wrong = ~(got == like)
        return f"differs in {int(wrong.sum())} of {wrong.numel()} places" if bool(wrong.any()) else None
    off, largest = (got.double() - right).abs(), float(right.abs().max())
    ulp, yardstick = torch.finfo(got.dtype).eps, float((like.double() - right).abs().max())
    terms = size.dim / 16 * (STRIDE if one.op == "score_antidiagonal" else 1) if one.op.startswith("score") else 2
    allowed = 2 * yardstick + terms * ulp * largest
    worst = float(off.nan_to_num(nan=float("inf")).max())
    return None if worst <= allowed else f"is off by {worst:.3g}, where rounding gives {allowed:.3g} at most"
