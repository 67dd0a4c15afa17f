"""Stores are tested over operations by their definitions, whatever backends a machine has."""

from __future__ import annotations

import pytest

from hf_longctx.kernels import dispatch

from . import packing


@pytest.fixture(autouse=True, scope="session")
def quantization() -> None:
    """Quantization by its docstring, as long as no backend has it."""
    reference = dispatch._table()["reference"]
    for name in ("encode_kv", "decode_kv"):
        reference.setdefault(name, dispatch.Implementation(getattr(packing, name)))
