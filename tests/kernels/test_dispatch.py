"""Which backend runs: the first that takes the arguments, the one that was asked for, or an error that says why."""

from __future__ import annotations

import threading

import pytest
import torch

import hf_longctx as lc
from hf_longctx.kernels import dispatch, ops

PLAIN = (*(torch.randn(1, 1, 2, 4) for _ in range(3)), ops.Logits(1.0), ops.Visibility(), None)
CAPPED = (*PLAIN[:3], ops.Logits(1.0, softcap=1.0), *PLAIN[4:])


@pytest.fixture(autouse=True)
def _no_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_LONGCTX_BACKEND", raising=False)


def test_the_first_that_takes_the_arguments() -> None:
    ops.attend_blocks(*PLAIN)
    assert dispatch.last_used()["attend_blocks"] == "torch"
    ops.attend_blocks(*CAPPED)
    assert dispatch.last_used()["attend_blocks"] == "reference"


def test_the_one_asked_for_inside_a_block_only() -> None:
    with lc.use_backend("reference"):
        assert dispatch.wanted() == "reference"
        ops.attend_blocks(*PLAIN)
        assert dispatch.last_used()["attend_blocks"] == "reference"
        with lc.use_backend("torch"):
            ops.attend_blocks(*PLAIN)
            assert dispatch.last_used()["attend_blocks"] == "torch"
        assert dispatch.wanted() == "reference"
    assert dispatch.wanted() is None


def test_a_block_ends_with_an_error_too() -> None:
    with pytest.raises(ZeroDivisionError), lc.use_backend("reference"):
        raise ZeroDivisionError
    assert dispatch.wanted() is None


def test_the_one_asked_for_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_LONGCTX_BACKEND", "reference")
    ops.attend_blocks(*PLAIN)
    assert dispatch.last_used()["attend_blocks"] == "reference"
    with lc.use_backend("torch"):  # the block is closer to the call
        assert dispatch.wanted() == "torch"
    monkeypatch.setenv("HF_LONGCTX_BACKEND", "")
    assert dispatch.wanted() is None


def test_a_call_of_a_model_looks_at_the_environment_once(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch.look_once(True)
    monkeypatch.setenv("HF_LONGCTX_BACKEND", "reference")
    assert dispatch.wanted() is None
    with lc.use_backend("torch"):  # a block inside the call holds all the same
        assert dispatch.wanted() == "torch"
    dispatch.look_once(True)  # the next call
    assert dispatch.wanted() == "reference"
    monkeypatch.delenv("HF_LONGCTX_BACKEND")
    assert dispatch.wanted() == "reference"
    dispatch.look_once(False)
    assert dispatch.wanted() is None


def test_other_threads_have_their_own_wish() -> None:
    seen: list[str | None] = []
    with lc.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.wanted()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(ValueError, match="expected one of flash, compiled, triton, flex, torch, reference; got 'fast'"),
        lc.use_backend("fast"),
    ):
        pass
    assert dispatch.wanted() is None
    monkeypatch.setenv("HF_LONGCTX_BACKEND", "fast")
    known = "flash, compiled, triton, flex, torch, reference"
    with pytest.raises(ValueError, match=f"HF_LONGCTX_BACKEND: expected one of {known}; got 'fast'"):
        ops.attend_blocks(*PLAIN)


def test_a_refusal_of_the_one_asked_for_says_why() -> None:
    reason = "attend_blocks: no backend takes these arguments. torch: has no softcap, learned sinks or ALiBi."
    with lc.use_backend("torch"), pytest.raises(lc.UnsupportedError) as error:
        ops.attend_blocks(*CAPPED)
    assert reason in str(error.value)
    assert "reference:" not in str(error.value)  # it was not asked for


def test_an_operation_that_the_one_asked_for_does_not_have() -> None:
    with lc.use_backend("torch"), pytest.raises(lc.UnsupportedError, match=r"append: .*torch: does not have it"):
        ops.append(torch.zeros(1, 1, 4, 2), torch.ones(1, 1, 2, 2), 0)


def test_table_of_operations_and_backends() -> None:
    rows = dispatch.table()
    assert {(row.op, row.backend) for row in rows} == {(op, b) for op in dispatch.OPS for b in dispatch.ORDER}
    assert all(row.available for row in rows if row.backend == "reference")
    assert all(bool(row.reason) != row.available for row in rows)
    with_torch = {row.op for row in rows if row.backend == "torch" and row.available}
    attends = {"attend_blocks", "attend_pages", "attend_recent"}
    assert with_torch == attends | {
        "score_antidiagonal",
        "w4a8_linear",
        "w4a8_linears",
        "w4a8_linears_of",
        "w4a8_experts",
    }
