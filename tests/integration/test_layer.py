"""A layer's decode step as one operation gives what its groups of heads give one by one; here with the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_longctx as lc
from hf_longctx import layer
from hf_longctx.kernels import dispatch
from hf_longctx.kernels.compiled import library

from ..kernels.built import need
from ..methods.cases import LIMITS, LOSSY, Row, named
from .cases import BY_NAME
from .test_generate import batch, generate
from .test_graph import INF_LLM, LSERVE, PLACED, QUEST, STORED, assert_same
from .tiny import Case

CASES = [BY_NAME[name] for name in ("llama", "gemma2", "gpt_oss", "mpt")]


def counted(row: Row, case: Case, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, int]:
    """What is generated, and in how many layers' steps by one operation."""
    calls = []
    call = dispatch.call

    def watch(op: str, *args: Any) -> Any:
        calls.append(op)
        return call(op, *args)

    monkeypatch.setattr(dispatch, "call", watch)
    out = generate(lc.patch(case.make(), row.method(case)), batch(case), output_logits=True, max_new_tokens=30)
    monkeypatch.setattr(dispatch, "call", call)
    return out, calls.count("attend_layer")


@pytest.mark.parametrize(
    ("row", "case"),
    [(row, c) for row in (LIMITS[0], *LOSSY, QUEST, LSERVE, *STORED) for c in CASES if row.takes(c)],
    ids=named,
)
def test_at_once_as_one_by_one(row: Row, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    need("cpu")
    one_by_one, none = counted(row, case, monkeypatch)
    monkeypatch.setattr(layer, "DEVICES", {"cpu"})
    at_once, some = counted(row, case, monkeypatch)
    assert none == 0
    assert (some > 0) == (not row.in_cache)
    assert_same(at_once, one_by_one)
