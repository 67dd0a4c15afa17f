"""Lets torchvision be imported beside a torch for CPUs alone, for which the operators of its wheel are not made.

Processors of pictures need none of them; only their names must be there. To be imported before transformers is.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch


def _named() -> list[torch.library.Library]:
    """The operators that transformers' import of torchvision asks for; they last as long as the result."""
    if find_spec("torchvision") is None:
        return []
    try:
        import_module("torchvision")
    except RuntimeError:
        names = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            names.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_module("torchvision")
        return [names]
    return []


OPERATORS = _named()
