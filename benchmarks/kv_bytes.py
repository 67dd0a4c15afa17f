"""Bytes of a text's keys and values under every method: as `report` says, and as live tensors say, as JSON.

python benchmarks/kv_bytes.py --out benchmarks/results/kv-bytes-smollm2.json
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import torch

import hf_longctx as lc
from hf_longctx.bench.live import reached, storages
from hf_longctx.evals import assets, grammar, results, text

METHODS = (
    "dense,quest(token_budget=1024),xattention(dense_below=0),lserve,inf_llm(local=2048),duo_attention,streaming_llm"
)


@torch.no_grad()
def row(model: Any, method: grammar.Choice, ids: torch.Tensor) -> dict[str, Any]:
    """Bytes that are held after a text and a token more."""
    with lc.patched(model, method.method, **method.knobs, cuda_graph=False):
        before = allocated(ids)
        out = model.generate(ids, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
        cache, seen = out.past_key_values, lc.report(model)
        del out
        held = storages(reached(cache))
        return {
            "method": method.name,
            "dense_kv_bytes": seen.dense_kv_bytes,
            "reported": {"device": seen.kv_bytes, "host": seen.host_bytes},
            "live": held,
            "allocated": allocated(ids) - before,
        }


def allocated(ids: torch.Tensor) -> int:
    """Bytes that torch has given out on the GPU; 0 without one."""
    gc.collect()
    return torch.cuda.memory_allocated() if ids.is_cuda else 0


def main() -> None:
    """Every method on one text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="a hub id or folder; SmolLM2-135M-Instruct if not given")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--device", default="auto")
    chosen = parser.parse_args()
    model, tokenizer = assets.load(chosen.model, "bfloat16", chosen.device)
    ids = tokenizer(text.read(None), return_tensors="pt").input_ids[:, : chosen.tokens].to(model.device)
    rows = []
    for method in grammar.methods(chosen.methods):
        rows.append(row(model, method, ids))
        print(json.dumps(rows[-1]), flush=True)
    settings = {"model": assets.display_name(chosen.model), "dtype": "bfloat16", "tokens": ids.shape[1]}
    results.save_json(chosen.out, {"meta": results.meta(model.device, settings), "rows": rows})


if __name__ == "__main__":
    main()
