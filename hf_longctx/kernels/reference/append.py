"""Writing fresh tokens into a store."""

from __future__ import annotations

import torch
from torch import Tensor


def append(store: Tensor, fresh: Tensor, slots: Tensor | int, written: Tensor | None) -> None:
    """The definition of `ops.append`."""
    fresh = fresh.detach().to(store.dtype)
    if isinstance(slots, int):
        store[:, :, slots : slots + fresh.shape[2]] = fresh
        return
    index = slots[:, None, :, None].expand_as(fresh)
    if written is not None:
        fresh = torch.where(written[:, None, :, None], fresh, store.gather(2, index))
    store.scatter_(2, index, fresh)
