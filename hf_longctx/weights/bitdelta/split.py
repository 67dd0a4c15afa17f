"""Tenants of a base under transformers' tensor parallelism: each process has the signs of its rows or columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedError
from ...shards import mesh_of, style_of
from .bits import WORD, Matrix
from .message import say

_ROWS, _COLUMNS = ("colwise",), ("rowwise", "rowwise_rep")
_WHOLE = (None, "colwise_gather_output", "colwise_rep", "rowwise_split_input", "replicated_with_grad_allreduce")
"""Styles under which a layer's input and output are whole in every process; so are then the signs."""

_EMBEDDINGS = ("embedding_rowwise", "embedding_colwise")


@dataclass(frozen=True)
class Part:
    """What one of several processes has of a linear layer.

    Attributes:
        columns: it has some of the input channels, and outputs are added up; else some of the output channels.
        rank: of this process.
        ranks: of all.
        group: torch's group of the processes.
    """

    columns: bool
    rank: int
    ranks: int
    group: Any

    def matrix(self, whole: Matrix) -> Matrix:
        """The signs and scales that belong to these channels."""
        bits, scales = whole.bits, whole.scales
        if self.columns:
            scales = self._mine(scales, 2) if scales.shape[2] > 1 else scales
            return Matrix(self._mine(bits, 2), scales)
        return Matrix(self._mine(bits, 1), self._mine(scales, 1) if scales.shape[1] > 1 else scales)

    def vector(self, whole: Tensor) -> Tensor:
        """What belongs to the output channels that are here after the layer."""
        return whole if self.columns else self._mine(whole, 0)

    def total(self, out: Tensor) -> Tensor:
        """The sum over all processes, where each has some of the input channels."""
        if self.columns:
            torch.distributed.all_reduce(out, group=self.group)
        return out

    def _mine(self, x: Tensor, dim: int) -> Tensor:
        return x.chunk(self.ranks, dim)[self.rank].contiguous()


def part_of(model: Any, name: str) -> Part | None:
    """What this process has of a linear layer; None: its input and output are whole here."""
    mesh, style = mesh_of(model), style_of(model, name)
    if mesh is None or style in _WHOLE:
        return None
    return Part(style in _COLUMNS, int(mesh.get_local_rank()), int(mesh.size()), mesh.get_group())


def check_split(where: str, model: Any, linears: Mapping[str, tuple[Matrix | None, bool]]) -> None:
    """Refuse what cannot be split as the base is.

    Args:
        where: for the message.
        model: the base.
        linears: by layer on which a tenant differs: its signs, if they are some, and whether the layer has a table of
            its own for each tenant, whole in every process.

    Raises:
        UnsupportedError: names the layer.
    """
    mesh = mesh_of(model)
    if mesh is None:
        return
    ranks, advice = int(mesh.size()), "Load the base without tensor parallelism"
    for name, (matrix, whole) in linears.items():
        style, here = style_of(model, name), f"{where}, {name}"
        if style in _WHOLE or (whole and style in _EMBEDDINGS):
            continue
        if matrix is None or style not in (*_ROWS, *_COLUMNS):
            got = f"'{style}' over {ranks} processes"
            raise UnsupportedError(say(here, "signs on a layer that is split by rows or columns", got, advice))
        rows, words, groups = matrix.bits.shape[1], matrix.bits.shape[2], matrix.scales.shape[2]
        sizes = (words, *([groups] if groups > 1 else [])) if style in _COLUMNS else (rows,)
        if any(size % ranks for size in sizes):
            unit = f"multiples of {WORD} inputs, and whole groups," if style in _COLUMNS else "whole outputs"
            got = f"{words * WORD} inputs in {groups} groups" if style in _COLUMNS else f"{rows} outputs"
            raise UnsupportedError(say(here, f"{unit} on each of {ranks} processes", got, advice))


def whole_weight(weight: Tensor) -> Tensor:
    """A weight that processes share, put together in each of them; others as they are."""
    full: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return full


def local_weight(weight: Tensor) -> Tensor:
    """What of a weight that processes share is here; others as they are."""
    local: Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
    return local


def require_whole(model: Any, where: str) -> None:
    """Refuse what changes whole weights.

    Raises:
        UnsupportedError: processes share them.
    """
    mesh = mesh_of(model)
    if mesh is not None:
        got = f"one over {mesh.size()} processes"
        raise UnsupportedError(say(where, "a model that is whole in this process", got, "Load it without tp_size"))
