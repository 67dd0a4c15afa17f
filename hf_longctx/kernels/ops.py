"""Every operation: its contract, and the values that it takes. The table of contents of `kernels/`."""

from __future__ import annotations

from torch import Tensor

from . import dispatch
from .fill import GroupFill, fill_pages
from .heads import attend_heads
from .layers import gated, rms_norm, rotate, rotate_heads
from .moves import bring_blocks, copy_blocks, take_tokens
from .recent import attend_recent, step_recent
from .step import Choice, GroupStep, attend_layer
from .types import HostBlocks, Logits, Packed, Places, Selection, Turns, Visibility

__all__ = [
    "Choice",
    "GroupFill",
    "GroupStep",
    "HostBlocks",
    "Logits",
    "Packed",
    "Places",
    "Selection",
    "Turns",
    "Visibility",
    "append",
    "append_pages",
    "attend_blocks",
    "attend_heads",
    "attend_layer",
    "attend_mass",
    "attend_pages",
    "attend_recent",
    "bring_blocks",
    "copy_blocks",
    "decode_kv",
    "encode_kv",
    "fill_pages",
    "gated",
    "pick_blocks",
    "rms_norm",
    "rotate",
    "rotate_heads",
    "score_antidiagonal",
    "score_pages",
    "step_recent",
    "take_tokens",
]


def attend_blocks(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection | None = None,
) -> Tensor:
    """Attention of many queries; keys are in the order of their positions and the last T of them are the queries' own.

    Time is O(T * (sink + window)) and extra memory does not grow with T where there is a window. With a selection, time
    is O(T * K * block), and the stored tensors may be in any order.

    Args:
        q: `[B, Hq, T, D]`; with `turns`, rotated at the query's lap position.
        k: `[B, Hkv, S, D]`, Hq a multiple of Hkv, S >= T.
        v: `[B, Hkv, S, Dv]`, likewise.
        logits: from products to logits.
        see: which keys each query sees. With a selection only `q_pos` is read (-1: a place without a query, whose
            output is zero): a query sees every key of its blocks at or before its own position.
        turns: how queries are turned to keys at lap positions; None: products are right as they are.
        selection: which blocks are read; None: all. Key i of a block stands at position `id * block + i`, and lies in
            column `page * block + i`; columns from S on do not exist.

    Returns:
        `[B, Hq, T, Dv]`, dtype of q; zero where a query sees nothing.

    Raises:
        UnsupportedError: the backend asked for does not take these arguments.
    """
    out: Tensor = dispatch.call("attend_blocks", q, k, v, logits, see, turns, selection)
    return out


def attend_pages(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection | None = None,
) -> Tensor:
    """`attend_blocks` of a few queries (decode); keys in any order, so `see.k_pos` speaks for each column."""
    out: Tensor = dispatch.call("attend_pages", q, k, v, logits, see, turns, selection)
    return out


def attend_mass(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection,
    near: int,
) -> tuple[Tensor, Tensor]:
    """`attend_blocks` with a selection, and how much attention each key got from the queries near it.

    Args:
        q: as in `attend_blocks`, like the next five.
        k: keys.
        v: values.
        logits: from products to logits.
        see: positions of the queries.
        turns: how queries are turned.
        selection: which blocks are read; not per query head. All K places are read, so that nothing waits for the
            device; where it says which are far, no other holds a key at a distance of `near`, or beyond `turns.clamp`.
        near: a query counts for a key at a distance below this.

    Returns:
        `[B, Hq, T, Dv]`, and `[B, Hkv, N, K * block]`, float32 (float64 if q is): softmax weights of each key, added up
        over the near queries of block n and the query heads of the KV head; zero where there is no key.
    """
    out: tuple[Tensor, Tensor] = dispatch.call("attend_mass", q, k, v, logits, see, turns, selection, near)
    return out


def score_pages(q: Tensor, summary: Tensor, subs: int, share: str) -> Tensor:
    """Score blocks by their summaries.

    With bounds (R = 2: least, largest) the score of a sub-block is the largest product that a key within the bounds
    could have, `sum_i max(q_i * least_i, q_i * largest_i)`; with one vector (R = 1) the product with it. A block has
    the largest score of its `subs` sub-blocks. Heads that share a selection have the largest score of all of them where
    there are bounds, else the mean.

    Args:
        q: `[B, Hq, N, D]`.
        summary: `[B, Hkv, M', R, D]`, one entry per sub-block; bounds of an empty sub-block are +inf and -inf.
        subs: sub-blocks of a block; M' need not be a multiple.
        share: `kv_head`, `q_head` or `all`: Hs is Hkv, Hq or 1.

    Returns:
        `[B, Hs, N, M]`, float32 (float64 if q is), M = ceil(M' / subs); a block without a key scores -inf.
    """
    out: Tensor = dispatch.call("score_pages", q, summary, subs, share)
    return out


def score_antidiagonal(
    q: Tensor, k: Tensor | Packed, q_pos: Tensor, block: int, stride: int, scale: float, causal: bool, rounded: str = ""
) -> Tensor:
    """Estimate how much attention each block of queries pays to each block of keys, from sums of antidiagonals.

    Tile r of queries and tile c of keys are positions `r * stride` to `(r + 1) * stride - 1`, and so on. Their logit is
    `scale / stride * sum_j q[r * stride + stride - 1 - j] . k[c * stride + j]`, with zero for queries that are not in
    the call and for keys that are not there. Each tile of queries has a softmax over the tiles of keys (c <= r if
    causal), and a block's score is the sum over its tiles. Tiles without a query add nothing.

    Args:
        q: `[B, Hq, N * block, D]`; each block's queries stand anywhere in it, at positions of one and the same block of
            the text.
        k: `[B, Hkv, S, D]`, column s at position s. If causal, columns after the row's last query hold no key, but
            anything; else all of them hold keys.
        q_pos: `[B or 1, N * block]`, int64, positions; -1 where there is no query.
        block: tokens of a block.
        stride: tokens of a tile; divides the block.
        scale: factor of the products.
        causal: no tile of keys after the tile of queries is seen.
        rounded: tiles are divided by their largest channel over 448 and rounded to e4m3 (`fp8`), or over 127 (`int8`).
            What a channel loses is added to the same of the token 256 / D further on in the tile, if that is whole.

    Returns:
        `[B, Hq, N, M]`, float32 (float64 if q is), M = ceil(S / block). Logits are held for a few blocks of queries.

    Raises:
        ValueError: a stride that does not divide the block, or queries that are no whole blocks.
    """
    if block % stride or q.shape[2] % block:
        raise ValueError(
            f"score_antidiagonal: expected a block of whole tiles and queries in whole blocks; got block {block}, "
            f"stride {stride} and {q.shape[2]} queries. Take a stride that divides the block, and fill up with -1."
        )
    out: Tensor = dispatch.call("score_antidiagonal", q, k, q_pos, block, stride, scale, causal, rounded)
    return out


def pick_blocks(
    scores: Tensor,
    low: Tensor,
    high: Tensor,
    sink: int,
    take: int | None,
    tau: Tensor | None,
    forced: int,
) -> Tensor:
    """The forced blocks, and the best of the others, of equal scores the first.

    Blocks below `sink` and from `low` to `high` are forced; candidates lie between; no block after `high` is picked.

    Args:
        scores: `[B, Hs, N, M]`, float.
        low: `[B or 1, N]`, int64, first of the local blocks.
        high: `[B or 1, N]`, int64, the block of the last query; -1: no query, nothing is picked.
        sink: blocks at the start.
        take: how many candidates are picked; None: so many that they and the forced blocks hold a share `tau` of the
            row's scores up to `high`: the shortest run of best candidates before which the sum is below that share.
        tau: `[Hs]`, float; a share of 1 picks all candidates, whatever rounding says.
        forced: an upper bound of the number of local blocks, known without looking at `low` and `high`.

    Returns:
        `[B, Hs, N, K]`, int32, ascending, then -1; K = min(M, sink + forced + take), or M.
    """
    out: Tensor = dispatch.call("pick_blocks", scores, low, high, sink, take, tau, forced)
    return out


def encode_kv(x: Tensor, bits: int) -> Packed:
    """Quantize keys or values per token and head, asymmetrically, over the channels.

    `scale = (max - min) / (2^bits - 1)` and `zero = -min / scale`, both rounded to float16 before they are used;
    `payload = round(x / scale + zero)`, clamped. The scale is at least max|x| / 2048, so that zero stays within
    float16's whole numbers and rows of (nearly) equal values keep their value to 1 / 1000, and at least 2^-14.

    Args:
        x: `[B, H, T, D]`; for 4 bits D is even.
        bits: 4 or 8.
    """
    out: Packed = dispatch.call("encode_kv", x, bits)
    return out


def decode_kv(x: Packed) -> Tensor:
    """The values that were stored: `[B, H, S, D]`, computed in float32, in `x.dtype`."""
    out: Tensor = dispatch.call("decode_kv", x)
    return out


def append(store: Tensor, fresh: Tensor, slots: Tensor | int, written: Tensor | None = None) -> None:
    """Write tokens into a store, in place.

    Args:
        store: `[B, Hkv, C, D]`.
        fresh: `[B, Hkv, T, D]`, any dtype; cast to the store's.
        slots: first slot of the T tokens if all rows are alike; else `[B, T]`, int64, one slot per token.
        written: `[B, T]`, bool; tokens where it is False leave the store as it was. Only with a slot per token.
    """
    dispatch.call("append", store, fresh, slots, written)


def append_pages(
    k_store: Tensor | Packed,
    v_store: Tensor | Packed,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    sink: int,
    ring: int | None,
    bounds: Tensor | None,
    sub: int,
    first: int | None = None,
) -> None:
    """Store a few tokens of each row (decode), in place: `encode_kv`, `append`, and the bounds of what they touch.

    The bounds of every sub-block that holds a written token are made anew from its stored keys, as they are read, up to
    the last position that is written in the row: those of a sub-block that was cut off (`crop`) come out right.

    Args:
        k_store: `[B, Hkv, C, D]`.
        v_store: `[B, Hkv, C, Dv]`.
        k: `[B, Hkv, T, D]`; cast to the store's dtype, quantized where the store is.
        v: `[B, Hkv, T, Dv]`, likewise.
        pos: `[B or 1, T]`, int64, position of each token in its row, -1 for one that is not written; no two tokens of a
            row have the same slot.
        sink: first tokens, which have slots of their own.
        ring: a token beyond the sinks goes to slot `sink + (pos - sink) % ring`; None: to slot `pos`.
        bounds: `[B, Hkv, M', 2, D]`, least and largest key of each sub-block; None: nothing is kept. Not with a ring.
        sub: tokens of a sub-block.
        first: the first position, where all rows are alike and all tokens are written in their order, and the host
            knows; None: only `pos` knows.
    """
    dispatch.call("append_pages", k_store, v_store, k, v, pos, sink, ring, bounds, sub, first)
