"""Servers that choose pages, or heads and pages, asked over HTTP."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_longctx.evals import assets

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(not assets.is_cached(), reason="SmolLM2 is not in the cache"),
]


def test_servers_answer_as_without_the_plugin_and_find_what_they_would_find(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    subprocess.run([sys.executable, "benchmarks/vllm_serve.py", "--small", "--out", str(out)], check=True, cwd=ROOT)
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 12
    assert [row["case"] for row in rows if not row.get("met", True)] == []
