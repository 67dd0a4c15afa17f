"""The compiled library on the CPU: every width of vectors gives what is defined, and any number of threads the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_longctx.kernels import ops
from hf_longctx.kernels.compiled import attend

from .built import need

HERE = Path(__file__).parent
NARROW = ["default", "avx2"]
"""Values of ATEN_CPU_CAPABILITY that hold the library, and torch, back; other tests run on the widest there is."""


@pytest.fixture(autouse=True)
def _compiled() -> None:
    need("cpu")


@pytest.mark.parametrize("capability", NARROW)
def test_narrower_vectors_give_what_is_defined(capability: str) -> None:
    files = sorted(map(str, HERE.glob("test_compiled_*.py")))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("selected", [False, True])
def test_the_number_of_threads_changes_nothing(selected: bool) -> None:
    """Enough columns for more tasks than threads."""
    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 64, generator=made).bfloat16() for heads, n in ((8, 3), (2, 9000), (2, 9000)))
    ids = torch.arange(0, 500, 2, dtype=torch.int32).expand(2, 2, 3, -1)
    arguments = (q, k, v, ops.Logits(0.125), ops.Visibility(), None, ops.Selection(ids, 16, 1) if selected else None)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(attend.attend_pages(*arguments))
    finally:
        torch.set_num_threads(before)
    assert results[0].isfinite().all()
    assert all(torch.equal(results[0], other) for other in results[1:])
