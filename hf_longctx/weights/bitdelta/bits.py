"""The difference of two matrices as signs, 32 in a word, and scales; and back.

Paper: BitDelta (arXiv:2402.10193) §3.1; more planes are §4.3, each made of what the ones before leave over.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .message import say

WORD = 32
"""Signs in a word of int32: bit b of word w is that of input `32 w + b`; 1 is plus."""

MOST_PLANES = 4


@dataclass(frozen=True)
class Grain:
    """How many weights share a scale.

    Attributes:
        rows: each row (output) has its own.
        group: inputs that share one, a multiple of 32; None: all of a row.
    """

    rows: bool = False
    group: int | None = None

    def __post_init__(self) -> None:
        if self.group is not None and (self.group < WORD or self.group % WORD):
            raise ValueError(say("grain", f"a group of a multiple of {WORD} inputs", self.group, "Change --group"))
        if self.group is not None and not self.rows:
            raise ValueError(say("grain", "groups within rows", "groups without rows", "Set rows=True"))

    @staticmethod
    def of(text: str) -> Grain:
        """`matrix`, `row`, or the number of inputs in a group."""
        if text.isdigit():
            return Grain(True, int(text))
        if text not in ("matrix", "row"):
            raise ValueError(say("grain", "matrix, row, or a number of inputs", repr(text), "Change --scales"))
        return Grain(text == "row")

    def mean(self, weights: Tensor) -> Tensor:
        """Mean magnitude of what shares a scale.

        Args:
            weights: `[N, K]`, float32; K a multiple of the group.

        Returns:
            `[1 or N, groups]`, float32: of all scales that go with given signs, these leave the least squared error.
        """
        if not self.rows:
            return weights.abs().mean(dtype=torch.float64).float().reshape(1, 1)
        return grouped(weights.abs(), self.group or weights.shape[-1]).mean(-1)


@dataclass(frozen=True)
class Matrix:
    """A difference in few bits: the sum over planes of sign times scale.

    Attributes:
        bits: `[P, N, K / 32]`, int32.
        scales: `[P, 1 or N, groups]`, float32; a group is `K / groups` inputs.
    """

    bits: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)` of the matrix."""
        return self.bits.shape[1], self.bits.shape[2] * WORD

    @property
    def nbytes(self) -> int:
        return self.bits.nbytes + self.scales.nbytes


def grouped(x: Tensor, size: int) -> Tensor:
    """`[..., K]` as `[..., K / size, size]`."""
    return x.reshape(*x.shape[:-1], -1, size)


def fits(weight: Tensor, grain: Grain) -> bool:
    """True if the inputs of a matrix `[N, K]` fill whole words and groups."""
    inputs = weight.shape[-1]
    return inputs > 0 and inputs % WORD == 0 and inputs % (grain.group or WORD) == 0


def pack(positive: Tensor) -> Tensor:
    """Signs as words.

    Args:
        positive: `[..., K]`, bool, K a multiple of 32.

    Returns:
        `[..., K / 32]`, int32.
    """
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=positive.device)
    eights = (grouped(positive, 8).to(torch.uint8) * weights).sum(-1, dtype=torch.uint8)
    return eights.contiguous().view(torch.int32)  # little-endian, as every machine that torch runs on


def unpack(bits: Tensor) -> Tensor:
    """Words as signs: `[..., K / 32]`, int32, to `[..., K]`, bool, True for plus."""
    turns = torch.arange(8, dtype=torch.uint8, device=bits.device)
    ones = (bits.contiguous().view(torch.uint8).unsqueeze(-1) >> turns) & 1
    return ones.flatten(-2).bool()


def compress(difference: Tensor, planes: int, grain: Grain) -> Matrix:
    """Signs and scales of a difference.

    Args:
        difference: `[N, K]`, float32; it is used up.
        planes: bits of each weight; every plane halves about what is left over.
        grain: of the scales.

    Raises:
        ValueError: a number of planes that there is not, or inputs that do not fill words and groups.
    """
    if not 1 <= planes <= MOST_PLANES:
        raise ValueError(say("bits", f"1 to {MOST_PLANES}", planes, "Change --bits"))
    if not fits(difference, grain):
        shape = tuple(difference.shape)
        raise ValueError(say("bits", f"inputs in whole words of {WORD} and whole groups", shape, "Keep it in 16 bits"))
    bits: list[Tensor] = []
    scales: list[Tensor] = []
    while len(bits) < planes:
        positive = difference >= 0  # a weight that did not change gets plus, as in the published code
        scale = grain.mean(difference)
        if bits and not bool(scale.any()):  # nothing is left over
            break
        bits.append(pack(positive))
        scales.append(scale)
        if len(bits) < planes:
            difference -= _signed(positive, scale)
    return Matrix(torch.stack(bits), torch.stack(scales))


def restore(matrix: Matrix, dtype: torch.dtype = torch.float32) -> Tensor:
    """The difference that is stored, `[N, K]`; summed in float32."""
    total = torch.zeros(matrix.shape, device=matrix.bits.device)
    for bits, scale in zip(matrix.bits, matrix.scales, strict=True):
        total += _signed(unpack(bits), scale)
    return total.to(dtype)


def _signed(positive: Tensor, scale: Tensor) -> Tensor:
    """Scales with signs: `[N, K]` and `[1 or N, groups]` to `[N, K]`."""
    groups = grouped(positive, positive.shape[-1] // scale.shape[-1])
    return torch.where(groups, scale.unsqueeze(-1), -scale.unsqueeze(-1)).flatten(-2)
