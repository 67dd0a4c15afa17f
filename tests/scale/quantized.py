"""One process of a quantized model, or of one with tenants, that is split by tensor parallelism."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from transformers.distributed import DistributedConfig

import hf_longctx as lc
from hf_longctx.weights.qoq.config import QoQConfig

from . import world
from .split import load, refusal

FORMS = {"w8": QoQConfig(8), "channel": QoQConfig(4, -1), "g32": QoQConfig(4, 32)}


def asked(model: Any) -> Any:
    """Logits of a prompt and the tokens that follow, with keys and values in 8 bits."""
    with torch.no_grad():
        logits = model(world.LLAMA.prompt(24).to(model.device)).logits
    return [logits.flatten().tolist(), world.ask(model, world.methods("int8")["duo_attention"])]


def rows_of(model: Any, tenants: dict[str, Path]) -> Any:
    """Logits of a batch of whose rows each has another tenant, and what they write."""
    ids = world.LLAMA.prompt(20, rows=len(tenants) + 1).to(model.device) % 60
    names = [*tenants, "__base__"]
    lc.deltas.load(model, tenants, slots=len(tenants))
    with torch.no_grad():
        logits = model(ids, adapter_names=names).logits
    lc.patch(model, "streaming_llm", sinks=2, window=12)
    written = model.generate(ids, adapter_names=names, max_new_tokens=4, do_sample=False, eos_token_id=None)
    lc.unpatch(model)
    return [logits.nan_to_num(neginf=-1e4).tolist(), written[:, 20:].tolist()]


def main(folder: Path) -> None:
    """All forms, as they are saved and rounded while they are loaded; then tenants."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    base = load(folder / "base")
    found["tenants"] = rows_of(base, {path.name: path for path in sorted(folder.glob("tenant-*"))})
    found["merged"] = refusal(lambda: base.merge_delta("tenant-a"))
    found["odd"] = refusal(lambda: lc.deltas.load(load(folder / "odd-base"), {"odd": folder / "odd"}))
    for form in FORMS:
        model = load(folder / form)
        found[form] = asked(model)
        bytes_here = sum(x.nbytes for name, x in model.named_parameters() if ".self_attn." in name or ".mlp." in name)
        found[f"{form} bytes"] = bytes_here
        found["saved"] = refusal(lambda model=model: model.save_pretrained(folder / "never"))
        config = DistributedConfig(tp_size=int(os.environ["WORLD_SIZE"]))
        fresh = hf.AutoModelForCausalLM.from_pretrained(
            folder / "dense", distributed_config=config, quantization_config=FORMS[form], dtype=torch.float32
        )
        found[f"{form} fresh"] = asked(fresh.eval()) == found[form]
    found["too fine"] = refusal(lambda: load(folder / "g64"))
    (folder / f"found-{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
