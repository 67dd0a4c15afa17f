"""Loss curves of a LoRA fine-tune through patched attention, beside those of the unpatched model, as JSON.

python benchmarks/finetune.py --out benchmarks/results/finetune-smollm2.json
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as hf

import hf_longctx as lc
from hf_longctx.evals import assets, grammar, results, text

METHODS = (
    "dense,streaming_llm(sinks=4,window=508),duo_attention,"
    "xattention(stride=8,tau=1.0,dense_below=0),xattention(stride=8,dense_below=0)"
)
LAST = 10  # steps at the end of a run, whose mean loss is compared


def run(chosen: argparse.Namespace, method: grammar.Choice | None, ids: torch.Tensor) -> list[float]:
    """Losses of a run, step by step; the same texts in the same order for every method."""
    torch.manual_seed(0)
    model, _ = assets.load(chosen.model, chosen.dtype, chosen.device)
    if method is not None:
        lc.patch(model, method.method, **method.knobs, train=True)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    with tempfile.TemporaryDirectory() as folder:
        settings = hf.TrainingArguments(
            folder,
            max_steps=chosen.steps,
            per_device_train_batch_size=chosen.rows,
            learning_rate=2e-4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=0,
            use_cpu=model.device.type == "cpu",
            gradient_checkpointing=chosen.checkpointing,
        )
        trainer = hf.Trainer(adapted, settings, train_dataset=[{"input_ids": x, "labels": x} for x in ids])
        trainer.train()
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def compare(losses: list[float], stock: list[float]) -> dict[str, Any]:
    """How far a run is from the unpatched one: at most at any step, and at its end as a share."""
    ends = [sum(each[-LAST:]) / len(each[-LAST:]) for each in (losses, stock)]
    largest = max(abs(a - b) for a, b in zip(losses, stock, strict=True))
    return {"losses": losses, "largest_difference": largest, "end": ends[0], "end_to_stock": ends[0] / ends[1]}


def main() -> None:
    """Every method on one text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="a hub id or folder; SmolLM2-135M-Instruct if not given")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--text", type=Path, help="UTF-8 text file; a text that ships with the package if not given")
    parser.add_argument("--tokens", type=int, default=2048, help="of a text")
    parser.add_argument("--rows", type=int, default=4, help="texts of a step")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    chosen = parser.parse_args()
    model, tokenizer = assets.load(chosen.model, chosen.dtype, chosen.device)
    words = text.read(chosen.text)
    stream = text.stream_ids(tokenizer, words)
    ids = stream[: len(stream) // chosen.tokens * chosen.tokens].view(-1, chosen.tokens)
    stock = run(chosen, None, ids)
    rows = [{"method": "unpatched", **compare(stock, stock)}]
    for method in grammar.methods(chosen.methods):
        rows.append({"method": method.name, **compare(run(chosen, method, ids), stock)})
        print({key: value for key, value in rows[-1].items() if key != "losses"}, flush=True)
    names = ("tokens", "rows", "steps", "dtype", "checkpointing")
    settings = {name: getattr(chosen, name) for name in names} | text.about(chosen.text, words)
    settings["model"] = assets.display_name(chosen.model)
    results.save_json(chosen.out, {"meta": results.meta(model.device, settings), "rows": rows})


if __name__ == "__main__":
    main()
