"""One process of a model that is split by tensor parallelism; writes what it found to a file of its own."""

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
from hf_longctx.obstacles import of_model

from . import world


def load(folder: Path) -> Any:
    """The model in a folder, split over all processes."""
    config = DistributedConfig(tp_size=int(os.environ["WORLD_SIZE"]))
    return hf.AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, dtype=torch.float32).eval()


def refusal(change: Any) -> str:
    """What was said against it."""
    try:
        change()
    except (ValueError, lc.UnsupportedError) as error:
        return f"{type(error).__name__}: {error}"
    return "taken"


def refused(model: Any) -> dict[str, str]:
    """What cannot be on a split model, each with what was said; it is as before."""
    before = sorted(vars(model)), sorted(vars(model.get_decoder()))
    found = {
        "one choice for all heads": refusal(lambda: lc.patch(model, "inf_llm")),
        "a context": refusal(lambda: lc.patch(model, "auto", context=4096)),
        "outlook": refusal(lambda: lc.plan(model)),
        "supports": "; ".join(str(each) for each in lc.supports(model) if not each.ok),
    }
    assert before == (sorted(vars(model)), sorted(vars(model.get_decoder())))
    return found


def kept(model: Any, folder: Path) -> list[int]:
    """What is written after a cache was saved and read again, each process its own."""
    lc.patch(model, world.methods("int8")["duo_attention"])
    ids = world.LLAMA.prompt(40).to(model.device)
    cache = model(ids[:, :39]).past_key_values
    path = folder / f"session-{os.environ['RANK']}.safetensors"
    lc.save_session(model, path, cache)
    torch.distributed.barrier()
    other = folder / f"session-{(int(os.environ['RANK']) + 1) % int(os.environ['WORLD_SIZE'])}.safetensors"
    assert "parts" in refusal(lambda: lc.load_session(model, other))
    again = model.generate(ids, past_key_values=lc.load_session(model, path), max_new_tokens=4, do_sample=False)
    lc.unpatch(model)
    written: list[int] = again[0, 40:].tolist()
    return written


def main(folder: Path) -> None:
    """All of it."""
    torch.set_num_threads(1)
    model = load(folder / "llama")
    stock = model(world.LLAMA.prompt(20).to(model.device)).logits
    found: dict[str, Any] = {"answers": world.answers(model), "refused": refused(model), "kept": kept(model, folder)}
    lc.patch(model, "duo_attention", pattern=world.GATES)
    found["groups"] = [[group.kv_heads for group in layer.groups] for layer in lc.report(model).plan.layers]
    found["eager"] = of_model(model.get_decoder(), lc.report(model).plan).now()
    assert torch.equal(lc.unpatch(model)(world.LLAMA.prompt(20).to(model.device)).logits, stock)
    if int(os.environ["WORLD_SIZE"]) == 2:
        found["others"] = {case.name: world.ask(load(folder / case.name), "dense") for case in world.OTHERS}
    one = load(folder / "one_head")
    found["one head"] = refusal(lambda: lc.patch(one, "dense"))
    (folder / f"found-{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
