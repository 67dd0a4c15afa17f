"""All that `patch` could leave behind on a model: attributes, hooks and configurations."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import torch
from torch import nn


def snapshot(model: Any) -> dict[str, Any]:
    """What there is to compare, by name; it holds on to the objects, so that identity means something."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            seen[f"{name}.{key}"] = dict(value) if isinstance(value, dict) else value
        if isinstance(getattr(module, "config", None), object) and "config" in vars(module):
            seen[f"{name}.config.*"] = copy.deepcopy(vars(module.config))
    seen["generation_config.*"] = copy.deepcopy(vars(model.generation_config)) if hasattr(model, "generate") else None
    return seen


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what was added, removed or changed."""
    return sorted(
        name
        for name in before.keys() | after.keys()
        if name not in before or name not in after or not _same(before[name], after[name])
    )


def hooks(model: nn.Module) -> int:
    """How many hooks its modules have."""
    return sum(
        len(module._forward_pre_hooks) + len(module._forward_hooks) + len(module._backward_hooks)
        for module in model.modules()
    )


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, dict) and isinstance(after, dict):
        return before.keys() == after.keys() and all(_same(before[key], after[key]) for key in before)
    if isinstance(before, list) and isinstance(after, list):
        return len(before) == len(after) and all(map(_same, before, after))
    if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
        return before is after or (not isinstance(before, nn.Parameter) and torch.equal(before, after))
    if isinstance(before, MethodType):
        return before == after
    return before is after or (type(before) is type(after) and _equal(before, after))


def _equal(before: Any, after: Any) -> bool:
    plain = (bool, int, float, str, tuple, set, type(None))
    return (isinstance(before, plain) or hasattr(before, "to_dict")) and before == after
