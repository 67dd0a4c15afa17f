"""What every process of a run computes: methods on models that are whole, or split by transformers over processes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from subprocess import run
from typing import Any

import torch
import transformers as hf

import hf_longctx as lc

from ..integration.cases import FAMILIES, LEARNED_POSITIONS
from ..integration.tiny import VOCABULARY, Case

ROOT = Path(__file__).resolve().parents[2]
LAYERS, Q_HEADS, KV_HEADS = 3, 8, 4
TOKENS, NEW = 72, 6


def _llama(**facts: Any) -> Callable[[], hf.PreTrainedModel]:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    shape = {"num_hidden_layers": LAYERS, "num_attention_heads": Q_HEADS, "num_key_value_heads": KV_HEADS}
    return lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**{**sizes, **shape, "eos_token_id": None, **facts}))


LLAMA = Case("llama", _llama(), LAYERS, KV_HEADS, Q_HEADS // KV_HEADS)
ONE_HEAD = Case("one_head", _llama(num_key_value_heads=1), LAYERS, 1, Q_HEADS)
OTHERS = tuple(
    case for case in (*FAMILIES, *LEARNED_POSITIONS) if case.name in ("qwen3", "phi3", "gpt_oss", "gemma3", "gpt_neox")
)
"""Norms of single heads, heads that are gathered, learned sinks, sliding windows, queries and keys in one weight."""

GATES = [[(7 * (i * KV_HEADS + h) % 12) / 12 for h in range(KV_HEADS)] for i in range(LAYERS)]
"""Of which one process of two gets more heads that stream than the other."""

TAU = [[0.3 + 0.05 * ((3 * i + h) % Q_HEADS) for h in range(Q_HEADS)] for i in range(LAYERS)]


def methods(kv: str) -> dict[str, Any]:
    """Every method, at knobs where it drops most of the text."""
    pages: Mapping[str, Any] = {"token_budget": 24, "page": 8, "kv": kv}
    blocks: Mapping[str, Any] = {"block": 8, "topk": 1, "representatives": 2, "q_block": 16, "resident_blocks": 3}
    stream: Mapping[str, Any] = {"pattern": GATES, "sinks": 4, "window": 12}
    return {
        "dense": lc.Dense(kv=kv),
        "streaming_llm": lc.StreamingLLM(sinks=4, window=20, kv=kv),
        "duo_attention": lc.DuoAttention(**stream, kv=kv),
        "quest": lc.Quest(dense_layers=1, **pages),
        "lserve": lc.LServe(**stream, **pages, prefill_window=32, logical=4, refresh_every=3, stride=4, tau=TAU),
        "xattention": lc.XAttention(stride=4, tau=TAU, block=8, kv=kv, dense_below=0),
        "inf_llm": lc.InfLLM(init=8, local=16, share="kv_head", kv=kv, **blocks),
    }


def ask(model: Any, method: Any) -> list[list[int]]:
    """What a patched model writes, a row of the batch padded on the left."""
    ids = torch.randint(8, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(3)).to(model.device)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    with lc.patched(model, method):
        written = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    tokens: list[list[int]] = written[:, TOKENS:].tolist()
    return tokens


def answers(model: Any) -> dict[str, list[list[int]]]:
    """What all methods write, with keys and values as they come and in 8 bits."""
    return {f"{name} {kv}": ask(model, method) for kv in ("native", "int8") for name, method in methods(kv).items()}


def launch(processes: int, module: str, *args: object) -> str:
    """Run a module of this folder in several processes; what they printed, if all went well."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *torchrun, "-m", f"tests.scale.{module}", *map(str, args)]
    done = run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
