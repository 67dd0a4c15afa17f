"""A delta as an adapter of low rank, for programs that know nothing else; and how much of it that loses.

Paper: BitDelta (arXiv:2402.10193) §4.1: the best approximation of low rank fails where signs do well.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from ...errors import UnsupportedError
from .bits import restore
from .experts import EXPERT
from .format import Delta
from .message import say

_MORE = 8
_TURNS = 4


@dataclass(frozen=True)
class Exported:
    """What an adapter of low rank keeps of a delta.

    Attributes:
        rank: of each matrix.
        errors: of each, the norm of what is lost over that of the difference: 0 is nothing, 1 is all.
        left_out: tensors that differ and are no matrices of linear layers: adapters do not carry them.
        nbytes: of the file.
    """

    rank: int
    errors: dict[str, float]
    left_out: tuple[str, ...]
    nbytes: int

    @property
    def error(self) -> float:
        """The mean over matrices."""
        return sum(self.errors.values()) / len(self.errors)

    def __str__(self) -> str:
        worst = max(self.errors, key=lambda name: self.errors[name])
        lines = [
            f"rank {self.rank}: loses {self.error:.1%} of the differences (mean of {len(self.errors)} matrices), "
            f"{self.errors[worst]:.1%} of {worst}; {self.nbytes / 2**20:.1f} MiB"
        ]
        if self.left_out:
            shown = ", ".join(self.left_out[:3]) + (", ..." if len(self.left_out) > 3 else "")
            lines.append(f"left out, as an adapter has no place for them: {len(self.left_out)} tensors ({shown})")
        return "\n".join(lines)


def export(
    delta: Delta, rank: int, out: Path, on_matrix: Callable[[int, int], None] = lambda n, total: None
) -> Exported:
    """Write the nearest adapter of a rank in the form of PEFT.

    Args:
        delta: what to approximate.
        rank: of each matrix, at least 1.
        out: folder, made if need be.
        on_matrix: told how many matrices are done, of how many.

    Raises:
        ValueError: a rank below 1, or there are no matrices.
        UnsupportedError: matrices of experts.
    """
    if rank < 1 or not delta.matrices:
        got = f"rank {rank} for {len(delta.matrices)} matrices"
        raise ValueError(say("export_lora", "a rank of at least 1, and matrices that differ", got, "Change --rank"))
    expert = next((name for name in delta.matrices if EXPERT.fullmatch(name)), None)
    if expert is not None:
        raise UnsupportedError(say("export_lora", "matrices of linear layers", expert, "Keep the delta as it is"))
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    for number, (name, matrix) in enumerate(delta.matrices.items(), 1):
        module, difference = name.removesuffix(".weight"), restore(matrix)
        up, down = _nearest(difference, rank)
        errors[module] = float((difference - up @ down).norm() / difference.norm())
        for part, x in (("lora_A", down), ("lora_B", up)):
            tensors[f"base_model.model.{module}.{part}.weight"] = x.to(torch.bfloat16).contiguous()
        on_matrix(number, len(delta.matrices))
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": delta.base.name,
        "revision": delta.base.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "bias": "none",
        "target_modules": sorted(errors),
    }
    (out / "adapter_config.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return Exported(rank, errors, tuple(sorted(delta.dense)), sum(x.nbytes for x in tensors.values()))


def _nearest(difference: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Two factors `[N, r]` and `[r, K]` whose product is nearest; of large matrices by random projection."""
    full = min(difference.shape)
    if full <= 8 * (rank + _MORE):
        left, values, right = torch.linalg.svd(difference, full_matrices=False)
        left, values, right = left[:, :rank], values[:rank], right[:rank]
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, values, turned = torch.svd_lowrank(difference, rank + _MORE, _TURNS)
        left, values, right = left[:, :rank], values[:rank], turned[:, :rank].T
    root, lacking = values.sqrt(), max(0, rank - len(values))  # of a smaller matrix: PEFT wants one rank for all
    return F.pad(left * root, (0, lacking)), F.pad(root[:, None] * right, (0, 0, 0, lacking))
