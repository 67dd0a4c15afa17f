"""Operations that move blocks of keys and values between the device and host memory: their contracts, as in `ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch
from .types import HostBlocks, Packed, Places


def bring_blocks(
    k: Tensor | Packed,
    v: Tensor | Packed,
    host: HostBlocks,
    ids: Tensor,
    lengths: Tensor,
    pool: Tensor,
    counts: Tensor,
    places: Places,
) -> Tensor:
    """Find blocks on the device; those that are only in host memory come into the pool, in place of others.

    Of a row and KV head, blocks that are in the pool stay; the others take, in their order, the places of those that
    were read longest ago; and all of them are then those read last, in their order.

    Args:
        k: `[B, Hkv, S, D]`, contiguous.
        v: `[B, Hkv, S, Dv]`, likewise.
        host: has every block without a place of its own.
        ids: `[B, Hs, 1, K]`, int32, ascending, then -1 for none; at most P have no place of their own. Hs is 1 or Hkv.
        lengths: `[B or 1]`, int64, tokens of each row.
        pool: `[B, Hkv, 2, P]`, int32, changed in place: the places of the pool, counted from its first, in the order in
            which they were read last; and the block that is in each, -1 for none.
        counts: `[2]`, int64, to which is added how many blocks without a place of their own were in the pool, and how
            many were not.
        places: where blocks lie.

    Returns:
        `[B, Hkv, 1, K]`, int32, the place of each block, -1 for none.
    """
    out: Tensor = dispatch.call("bring_blocks", k, v, host, ids, lengths, pool, counts, places)
    return out


def copy_blocks(
    k: Tensor | Packed,
    v: Tensor | Packed,
    host: HostBlocks,
    first: Tensor,
    last: Tensor,
    most: int,
    places: Places,
    out: bool,
) -> None:
    """Copy a run of blocks of each row, of all its heads, to host memory or back.

    Args:
        k: `[B, Hkv, S, D]`, contiguous.
        v: `[B, Hkv, S, Dv]`, likewise.
        host: has room for the blocks.
        first: `[B or 1]`, int64, the first block.
        last: `[B or 1]`, int64, the block behind the last.
        most: blocks that a run has at most, known without looking at `first` and `last`.
        places: where the blocks lie in `k` and `v`: at `places.page`.
        out: True: to host memory.
    """
    dispatch.call("copy_blocks", k, v, host, first, last, most, places, out)


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """`out[b, :, t] = x[b, :, index[b, t]]`: tokens of each row, in another order.

    Args:
        x: `[B, H, T, D]`.
        index: `[B, N]`, int64.

    Returns:
        `[B, H, N, D]`.
    """
    return torch.gather(x, 2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
