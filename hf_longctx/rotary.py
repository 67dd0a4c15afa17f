"""How each layer of a model rotates its queries and keys, found by looking instead of by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .cache.step import Step
from .context import Forward, Rotary
from .errors import UnsupportedError
from .kernels import ops
from .models import ModelFacts, takes_positions
from .plan import Plan


def find_rotary(decoder: PreTrainedModel, facts: ModelFacts, plan: Plan) -> tuple[Rotary, ...]:
    """How each layer rotates, seen on one tiny call: the same tokens at two places, with attention that gives zeros.

    Raises:
        UnsupportedError: a layer's queries move with the position in a way that is not a known rotation.
    """
    shift = 7
    weight: Any = decoder.get_input_embeddings().weight
    device = torch.device("cpu") if weight.is_meta else weight.device  # offloaded: its hooks move what comes in
    pos = torch.arange(3, device=device)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    step = Step.of(0, 3, device, None, None)
    forward = Forward(facts, plan, step, None, probe=found)
    arguments = {"position_ids": torch.stack((pos, pos + shift))} if takes_positions(decoder) else {}
    training = decoder.training
    decoder.train(False)
    try:
        with torch.no_grad():
            tokens = torch.zeros(2, 3, dtype=torch.int64, device=device)
            decoder(input_ids=tokens, hf_longctx=forward, use_cache=False, **arguments)
    finally:
        decoder.train(training)
    candidates = [b for name, b in decoder.named_buffers() if name.endswith("inv_freq") and b is not None]
    return tuple(_rotary(facts, layer, *found[layer], candidates, shift) for layer in range(len(facts.layers)))


def _rotary(facts: ModelFacts, layer: int, q: Tensor, k: Tensor, candidates: list[Tensor], shift: int) -> Rotary:
    """The rotation that carries row 0 of q and k `[2, H, T, D]` to row 1."""
    delta = torch.full((1, q.shape[2]), shift, device=q.device)
    tolerance = 1e-3 if q.dtype in (torch.float32, torch.float64) else 3e-2

    def error(rotary: Rotary) -> float:
        worst = 0.0
        for x in (q, k):
            here, there = x[:1].float(), x[1:].float()
            if rotary.inv_freq is not None:
                here = ops.rotate(here, delta, rotary.inv_freq.to(x.device), rotary.interleaved)
            worst = max(worst, float((here - there).abs().max() / there.abs().max().clamp(min=1e-9)))
        return worst

    fit = [f for f in candidates if 2 * f.shape[-1] <= q.shape[-1]]  # layers may have heads of several sizes
    known = [Rotary(None)] + [Rotary(f.float().clone(), i) for f in fit for i in (False, True)]
    best = min(known, key=error)
    if error(best) > tolerance:
        raise UnsupportedError(
            f"streaming: expected layer {layer} of '{facts.family}' to rotate queries and keys in halves or in "
            f"pairs by its inv_freq; got something else (relative error {error(best):.1e}). Use a method with "
            "positions of the text, such as 'duo_attention'."
        )
    return best
