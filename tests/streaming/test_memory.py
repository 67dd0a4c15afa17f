"""Bytes of live tensors, and the peak of the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hf_longctx as lc
from hf_longctx.testing import feed, tiny_llama

from . import draws

STATUS = Path("/proc/self/status")


@pytest.mark.parametrize("calls", [[300], [1] * 300, [7, 100, 1, 1, 191]], ids=["prompt", "steps", "chunks"])
def test_windows_hold_sinks_and_window_and_no_token_more(calls: list[int]) -> None:
    model, ids = tiny_llama(), draws.tokens(2, 300, seed=0)
    per_token = 2 * 2 * 2 * 2 * 8 * 4  # rows, keys and values, layers, KV heads, channels, bytes
    with lc.patched(model, lc.StreamingLLM(sinks=4, window=16)), torch.no_grad():
        cache, start = None, 0
        for size in calls:
            cache = model(ids[:, start : start + size], past_key_values=cache, use_cache=True).past_key_values
            start += size
            assert cache.kv_bytes <= min(20, -(-start // 64) * 64) * per_token
            held = {tuple(x.shape) for stack in cache.layers for _, s in stack.stores for x in (s.k, s.v)}
            assert held == {(2, 2, min(20, -(-start // 64) * 64), 8)}
    with lc.patched(model, "dense"):
        _, cache = feed(model, ids, calls)
    assert cache.kv_bytes >= 300 * per_token


def test_half_of_the_heads_streaming_holds_half_of_the_bytes_at_32k() -> None:
    """Prompt, then some steps: growth must not eat what streaming heads save."""
    model = tiny_llama(num_hidden_layers=1, max_position_embeddings=40_000)
    ids = draws.tokens(1, 32_768 + 3, seed=0)
    with lc.patched(model, lc.DuoAttention(pattern=[[1.0, 0.0]], sparsity=0.5, sinks=128, window=256)), torch.no_grad():
        cache = None
        for start, stop in ((0, 32_768), (32_768, 32_769), (32_769, 32_771)):
            cache = model(ids[:, start:stop], past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
            dense = stop * 2 * 2 * 8 * 4  # keys and values, KV heads, channels, bytes
            expected = (0.5 + 0.5 * 384 / 32_768) * dense
            assert abs(cache.kv_bytes / expected - 1) < 0.05


RSS = """
import sys
from pathlib import Path
import torch
import hf_longctx as lc
from hf_longctx.testing import tiny_llama

def peak():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

torch.set_num_threads(1)
model = lc.patch(tiny_llama(), lc.StreamingLLM(sinks=4, window=1020))
model.generation_config.pad_token_id = 0
for tokens in (2_000, 100_000):
    ids = torch.randint(8, 64, (1, tokens), generator=torch.Generator().manual_seed(0))
    model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    print(peak())
"""


@pytest.mark.skipif(not STATUS.exists(), reason="reads the peak from /proc")
def test_a_prompt_of_100k_tokens_costs_less_than_300_mb() -> None:
    """The kernel's peak of this very process image: `getrusage` in a child starts from the parent's peak."""
    run = subprocess.run([sys.executable, "-c", RSS], capture_output=True, text=True, check=True)
    short, long = map(float, run.stdout.split())
    print(f"peak {short:.0f} MB at 2K tokens, {long:.0f} MB at 100K")
    assert long - short < 300
