"""Operations as a compiler sees them: what `torch.library` is told holds on all backends; graphs give what calls do."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from hf_longctx.errors import UnsupportedError
from hf_longctx.kernels import delta, dispatch, linear, ops, traced
from hf_longctx.kernels.dispatch import use_backend

from . import deltas, test_step
from .built import need
from .calls import calls, copied

CPU = "cpu"
CALLS = list(calls(CPU))
FIRST = {name: i for i, (name, _) in reversed(list(enumerate(CALLS)))}
SLOW = pytest.mark.slow
each = pytest.mark.parametrize(
    "case",
    [pytest.param(i, id=f"{n}-{i}", marks=() if i == FIRST[n] else SLOW) for i, (n, _) in enumerate(CALLS)],
)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


def takes(backend: str, name: str, args: tuple[Any, ...]) -> bool:
    try:
        with use_backend(backend):
            return dispatch.chosen(name, *args) == backend
    except UnsupportedError:
        return False


PAIRS = [(i, b) for b in ("reference", "torch", "compiled") for i, call in enumerate(CALLS) if takes(b, *call)]
"""Calls, and the backends of a CPU that take them."""


QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")


def check(name: str, args: tuple[Any, ...], quick: bool = False) -> None:
    """What is changed and what is not, what comes out, aliases, gradients; unless `quick`, that graphs can be made."""
    operation = traced.OPERATIONS[name]
    tests = {"test_utils": QUICK} if quick else {}
    with torch.no_grad():
        torch.library.opcheck(operation.overload, tuple(traced.flatten(operation.parts, args)), **tests)


def tensors(x: Any) -> list[Tensor]:
    """All tensors of a value, in order."""
    if isinstance(x, Tensor):
        return [x]
    if is_dataclass(x):
        return [y for field in fields(x) for y in tensors(getattr(x, field.name))]
    return [y for one in x for y in tensors(one)] if isinstance(x, list | tuple) else []


def test_every_operation_is_there_and_has_calls() -> None:
    assert set(traced.TABLE) == set(traced.OPERATIONS) == set(dispatch.OPS) == {name for name, _ in CALLS}
    for name in dispatch.OPS:
        assert getattr(torch.ops.hf_longctx, name).default is traced.OPERATIONS[name].overload
    assert len([b for _, b in PAIRS if b == "reference"]) == len(CALLS)


def test_the_compiled_library_is_among_the_backends() -> None:
    need(CPU)
    with_library = {CALLS[i][0] for i, b in PAIRS if b == "compiled"}
    assert with_library >= {"attend_pages", "append_pages", "score_pages", "pick_blocks", "delta_linear", "w4a8_linear"}


@pytest.mark.parametrize(("case", "backend"), [pytest.param(i, b, id=f"{CALLS[i][0]}-{i}-{b}") for i, b in PAIRS])
def test_what_is_told_holds(case: int, backend: str) -> None:
    name, args = CALLS[case]
    seen = any(b == backend and CALLS[i][0] == name for i, b in PAIRS[: PAIRS.index((case, backend))])
    with use_backend(backend):
        check(name, tuple(copied(x) for x in args), quick=seen)
    assert dispatch.last_used()[name] == backend


@pytest.mark.cuda
def test_what_is_told_holds_on_a_gpu() -> None:
    need("cuda")
    used: set[str] = set()
    failed: dict[str, str] = {}
    for name, args in calls("cuda"):
        try:
            check(name, args, quick=name in used | failed.keys())
        except Exception as error:  # so that one run tells of all of them
            failed[name] = str(error)
        used |= {name} if dispatch.chosen(name, *args) == "compiled" else set()
    assert not failed
    assert used >= {"attend_blocks", "attend_heads", "attend_pages", "attend_layer", "append_pages", "score_pages"}
    assert used >= {"score_antidiagonal", "pick_blocks", "rms_norm", "gated", "rotate_heads", "w4a8_linear"}


@each
def test_a_graph_gives_what_the_call_does(case: int) -> None:
    name, args = CALLS[case]
    mine, theirs = ([copied(x) for x in args] for _ in range(2))
    backend = "eager" if case == FIRST[name] else "aot_eager"
    run = torch.compile(lambda *given: dispatch.call(name, *given), backend=backend, fullgraph=True)
    with torch.no_grad():
        got, expected = run(*mine), dispatch.call(name, *theirs)
    assert type(got) is type(expected)
    for x, y in zip(tensors((got, mine)), tensors((expected, theirs)), strict=True):
        torch.testing.assert_close(x, y, atol=0, rtol=0, equal_nan=True)
    for x, y in zip(tensors(got), tensors(expected), strict=True):
        assert x.dtype == y.dtype
    if isinstance(got, ops.Packed):
        assert (got.bits, got.dtype) == (expected.bits, expected.dtype)


def test_public_functions_are_traced_whole() -> None:
    x, base, bits, scales, slots = deltas.make(deltas.Case(5, 96, 64, 3, 3), torch.float32)

    def run(x: Tensor) -> Tensor:
        y = ops.rms_norm(x, x[0], 1e-5, 0.0, True)
        y = delta.linear_with_delta(y, base.T @ x, None, bits, scales, slots)
        return linear.quantize_tokens(ops.gated(y, y)).scale

    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        assert torch.equal(torch.compile(run, backend=backend, fullgraph=True)(x), run(x))
    called = {str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"}
    assert {f"hf_longctx.{name}.default" for name in ("rms_norm", "delta_linear", "gated", "quantize_tokens")} <= called


def test_shapes_may_change_without_another_graph() -> None:
    seen = torch._dynamo.testing.CompileCounter()
    run = torch.compile(ops.pick_blocks, backend=seen, fullgraph=True, dynamic=True)
    for blocks in (5, 9, 12):
        scores, low, high = torch.rand(1, 2, 1, blocks), torch.tensor([[blocks - 2]]), torch.tensor([[blocks - 1]])
        args = (scores, low, high, 1, 2, None, 2)
        assert torch.equal(run(*args), ops.pick_blocks(*args))
    assert seen.frame_count == 1


def test_gradients_are_those_of_a_call_and_the_compiler_is_told_why() -> None:
    x, weight = torch.randn(3, 8), torch.randn(8)

    def run(x: Tensor) -> Tensor:
        return ops.rms_norm(x * 2, weight, 1e-5, 0.0, True).sum()

    found = []
    for function in (run, torch.compile(run, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        function(leaf).backward()
        found.append(leaf.grad)
    assert torch.equal(found[1], found[0])
    (why,) = counters["graph_break"]
    assert "operations have no gradient in a graph" in why


def test_a_summary_that_is_not_the_bounds_is_refused() -> None:
    args = test_step.made(test_step.BASE, CPU)
    apart = test_step.copied(args[4][0].choice.summary)
    group = test_step.replace(args[4][0], choice=test_step.replace(args[4][0].choice, summary=apart))
    with pytest.raises(ValueError, match="attend_layer: expected a choice by the bounds of its group"):
        traced.call("attend_layer", (*args[:4], [group]))


def test_calls_that_nobody_traces_register_nothing() -> None:
    code = (
        "import sys, torch; from hf_longctx.kernels import ops;"
        "ops.gated(torch.ones(2), torch.ones(2));"
        "assert 'hf_longctx.kernels.traced' not in sys.modules;"
        "assert 'torch._dynamo' not in sys.modules;"
        "assert not hasattr(torch.ops.hf_longctx, 'gated')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
