"""Measure which KV heads look at a needle, and write that as a head pattern.

The shipped pattern of SmolLM2-135M-Instruct was made by

    python benchmarks/attention_pattern.py -o hf_longctx/heads/patterns/SmolLM2-135M-Instruct

The score of a query head is the attention mass that it puts on the needle, from the last words of the question and
from the digits of the answer; of a KV head, the largest among the query heads that share it; averaged over prompts.
This is a measurement in one forward pass per prompt, not the training of gates that DuoAttention (arXiv 2410.10819)
does; the gates are in [0, 1] all the same, and only their order matters where a sparsity is asked for.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from hf_longctx.evals import assets, passkey, text
from hf_longctx.heads import HeadPattern, save_pattern

ASKING = 4  # last tokens of the question: " The pass key is"


def needle_mass(model: Any, tokenizer: Any, trial: passkey.Passkey) -> torch.Tensor:
    """Attention mass on the needle, the mean over the asking and answering tokens.

    Returns:
        `[L, Hq]`, float32, 0 to 1.
    """
    answer = torch.tensor(text.token_ids(tokenizer, f" {trial.key}"))
    ids = torch.cat((trial.ids, answer))[None].to(model.device)
    last = len(answer) + ASKING
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        past = model(ids[:, :-last], use_cache=True, logits_to_keep=1).past_key_values
        model.set_attn_implementation("eager")  # the only one that shows its weights; [Hq, last, T] is small
        seen = model(ids[:, -last:], past_key_values=past, output_attentions=True).attentions
    first, end = trial.needle
    return torch.stack([layer[0, :, :, first:end].float().sum(-1).mean(-1) for layer in seen]).cpu()


def main() -> None:
    """Measure, check that two halves of the prompts agree, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", help="hub id or folder; default SmolLM2-135M-Instruct")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the pattern")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 3072])
    parser.add_argument(
        "--seed", type=int, default=1000, help="of the first prompt; the demo and the tests use small seeds"
    )
    args = parser.parse_args()
    model, tokenizer = assets.load(args.model, "float32")
    config = model.config.get_text_config(decoder=True)
    masses = []
    for i in track(range(args.prompts), "prompts"):
        depth = 0.05 + 0.85 * i / max(1, args.prompts - 1)
        length = args.lengths[i % len(args.lengths)]
        trial = passkey.build(tokenizer, text.shipped(), length, depth, args.seed + i)
        masses.append(needle_mass(model, tokenizer, trial))
    shape = (args.prompts, config.num_hidden_layers, config.num_key_value_heads, -1)
    heads = torch.stack(masses).reshape(shape).amax(-1)
    halves = torch.stack((heads[::2].mean(0).flatten(), heads[1::2].mean(0).flatten()))
    agreement = torch.corrcoef(halves)[0, 1].item()
    gates = tuple(tuple(row) for row in heads.mean(0).double().tolist())
    name = assets.display_name(args.model)
    save_pattern(HeadPattern(name, gates), args.out)
    path = args.out / "config.json"
    made = {
        "made_by": "benchmarks/attention_pattern.py",
        "score": "attention mass on the needle, mean over prompts, max over the query heads of a KV head",
        "prompts": args.prompts,
        "lengths": args.lengths,
        "seed": args.seed,
        "agreement_of_halves": round(agreement, 4),
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), **made}, indent=2) + "\n")
    print(f"{name}: {len(gates)} layers x {len(gates[0])} KV heads, agreement of the two halves r = {agreement:.4f}")


if __name__ == "__main__":
    main()
