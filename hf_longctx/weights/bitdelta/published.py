"""`diff.pt`, the form in which deltas of the paper were published: read without running any code in it.

Its keys: `<module>.mask`, int32 `[K / 32, N]`; `<module>.coeff`, a number; `<name>.weight`, a tensor of the fine-tune.
Paper: BitDelta (arXiv:2402.10193), published code.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .format import SCALES, Base, Delta, sort
from .message import say

_MASK, _COEFF = ".mask", ".coeff"
_FORM = "a diff.pt of BitDelta: a dictionary of .mask, .coeff and .weight tensors"


def read_published(path: Path) -> Delta:
    """A published delta; it does not say of which base.

    Raises:
        ValueError: the file is damaged, holds anything but tensors, or other tensors.
    """
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        got = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        advice = "Only tensors are read, and code in a file is never run: fetch it again, or get it from elsewhere"
        raise ValueError(say(str(path), _FORM, got, advice)) from error
    if not isinstance(content, dict) or not content or not all(isinstance(x, Tensor) for x in content.values()):
        raise ValueError(say(str(path), _FORM, type(content).__name__, "Is it another kind of file?"))
    tensors: dict[str, Tensor] = {}
    for key, value in content.items():
        x = value.detach()
        if key.endswith(_MASK):
            tensors |= _signs(f"{path}, {key}", key.removesuffix(_MASK), x, content)
        elif not key.endswith((_COEFF, ".weight", ".bias")):
            raise ValueError(say(f"{path}, {key}", _FORM, "another tensor", "Differences of low rank are not read"))
        elif not key.endswith(_COEFF):
            tensors[key] = x
        elif key.removesuffix(_COEFF) + _MASK not in content:
            raise ValueError(say(f"{path}, {key}", "a .mask beside it", "none", "Fetch it again"))
    return sort(str(path), tensors, Base(), {})


def _signs(where: str, module: str, mask: Tensor, content: dict[str, Tensor]) -> dict[str, Tensor]:
    """One matrix in the form of our files: the words of an output next to each other."""
    coeff = content.get(module + _COEFF)
    if mask.dtype != torch.int32 or mask.ndim != 2 or coeff is None or coeff.numel() != 1:
        got = f"{mask.dtype} {tuple(mask.shape)} and {None if coeff is None else tuple(coeff.shape)}"
        raise ValueError(say(where, "int32 [inputs / 32, outputs] and one number as .coeff", got, "Fetch it again"))
    scales = coeff.detach().float().reshape(1, 1, 1)
    return {f"{module}.weight": mask.T.contiguous().unsqueeze(0), f"{module}.weight{SCALES}": scales}
