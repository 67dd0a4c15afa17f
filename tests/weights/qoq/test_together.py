"""Layers that read the same input: one launch once they were seen to, and the same bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_longctx.weights.qoq import linear as room
from hf_longctx.weights.qoq.config import QoQConfig
from hf_longctx.weights.qoq.grids import nearest_grid
from hf_longctx.weights.qoq.linear import QoQLinear

CONFIG = QoQConfig(4, 32)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Short cuts on the CPU; how many weights each launch of several has."""
    monkeypatch.setattr(room, "DEVICES", {"cpu"})
    found: list[int] = []
    run = room.w4a8_linears

    def counting(tokens: Any, weights: Any, *others: Any) -> list[Tensor]:
        found.append(len(weights))
        return run(tokens, weights, *others)

    monkeypatch.setattr(room, "w4a8_linears", counting)
    return found


def layer(rows: int, seed: int, columns: int = 64) -> QoQLinear:
    torch.manual_seed(seed)
    dense = nn.Linear(columns, rows, bias=seed % 2 == 1)
    weight = dense.weight.detach()
    grid = nearest_grid(weight, CONFIG)
    return QoQLinear.of(dense, grid, grid.codes(weight), CONFIG)


@torch.no_grad()
def alone(layers: list[QoQLinear], x: Tensor) -> list[Tensor]:
    return [each(x.clone()) for each in layers]


@torch.no_grad()
def test_once_they_are_known(launches: list[int]) -> None:
    layers = [layer(n, seed) for seed, n in enumerate((96, 32, 40, 64))]
    inputs = [torch.randn(1, 3, 64) for _ in range(3)]
    expected = [alone(layers, x) for x in inputs]
    launches.clear()
    for x, results in zip(inputs, expected, strict=True):
        assert all(torch.equal(each(x), y) for each, y in zip(layers, results, strict=True))
    assert launches == [1, 3, 3]  # the fourth is one too many
    x = inputs[0]
    x.mul_(-1)  # another content
    assert all(torch.equal(each(x), y) for each, y in zip(layers, alone(layers, x), strict=True))
    again = [each(x) for each in layers]  # another pass
    assert all(torch.equal(y, z) for y, z in zip(again, alone(layers, x), strict=True))


@torch.no_grad()
def test_copies_know_their_own(launches: list[int]) -> None:
    pair = nn.ModuleList([layer(32, 0), layer(32, 1)])
    x = torch.randn(1, 2, 64)
    for each in pair:
        each(x)
    assert list(pair.state_dict()) == list(nn.ModuleList([layer(32, 0), layer(32, 1)]).state_dict())
    other: Any = copy.deepcopy(pair)
    other[1].weight_scale.mul_(2)
    x = torch.randn(1, 2, 64)
    launches.clear()
    assert torch.equal(other[0](x), pair[0](x.clone()))
    assert torch.equal(other[1](x), other[1](x.clone()))
    assert launches[0] == 2


def test_who_is_left_alone(launches: list[int]) -> None:
    """Many tokens, gradients, and other inputs."""
    first, second = layer(32, 0), layer(32, 1)
    for _ in range(2):
        x = torch.randn(1, 17, 64, requires_grad=True)
        (first(x) + second(x)).sum().backward()
        with torch.no_grad():
            first(x), second(x)
            first(torch.randn(1, 1, 64)), second(torch.randn(1, 1, 64))
    assert launches == [1] * 4
    assert x.grad is not None
