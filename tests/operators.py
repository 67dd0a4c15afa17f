"""Lets torchvision be imported beside a torch for CPUs alone, for which the operators of its wheel are not made.

Processors of pictures need none of them; only their names must be there. To be imported before transformers is.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import pytest
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
HAS_TORCHVISION = find_spec("torchvision") is not None
"""Video processors of transformers need it; the extra `video` brings it, and `.ci/run` last of all."""

needs_torchvision = pytest.mark.skipif(not HAS_TORCHVISION, reason="torchvision is not installed")
