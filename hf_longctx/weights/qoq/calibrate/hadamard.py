"""Orthogonal matrices of plus and minus ones: a rotation by one spreads an outlier over all channels."""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(order: int) -> Tensor:
    """A rotation `[order, order]` float64: Hadamard's, over the square root of its order, or blocks of such.

    Sylvester's doubling of the smallest of Paley's matrices (prime fields) that fits; where none does, equal blocks of
    the largest power of two that divides the order.
    """
    for doublings in reversed(range(order.bit_length())):
        core = None if order % (1 << doublings) else _paley(order >> doublings)
        if core is not None:
            for _ in range(doublings):
                core = torch.cat((torch.cat((core, core), 1), torch.cat((core, -core), 1)))
            return core.div(order**0.5)
    part = order & -order
    return torch.kron(torch.eye(order // part, dtype=torch.float64), hadamard(part))


def rotation(order: int, seed: int) -> Tensor:
    """`hadamard` with rows of random sign, so that a constant vector is no longer one of its axes."""
    signs = torch.randint(0, 2, (order,), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return hadamard(order) * signs[:, None]


def _paley(order: int) -> Tensor | None:
    """A Hadamard matrix of that order without doubling, or None if no prime gives it."""
    if order <= 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:order, :order]
    if _prime(order - 1) and (order - 1) % 4 == 3:
        skew = _bordered(order - 1, -1.0)
        return skew + torch.eye(order, dtype=torch.float64)
    if order % 2 == 0 and _prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        core, one = _bordered(order // 2 - 1, 1.0), torch.eye(order // 2, dtype=torch.float64)
        return torch.cat((torch.cat((core + one, core - one), 1), torch.cat((core - one, -core - one), 1)))
    return None


def _prime(number: int) -> bool:
    return number > 2 and all(number % i for i in range(2, int(number**0.5) + 1))


def _bordered(prime: int, sign: float) -> Tensor:
    """Paley's conference matrix `[prime + 1, prime + 1]`: quadratic residues of differences, with a border of ones."""
    residues = {i * i % prime for i in range(1, prime)}
    values = torch.tensor([0.0] + [1.0 if i in residues else -1.0 for i in range(1, prime)], dtype=torch.float64)
    index = torch.arange(prime)
    out = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    out[0, 0] = 0
    out[1:, 0] = sign
    out[1:, 1:] = values[(index[:, None] - index[None, :]) % prime]
    return out
