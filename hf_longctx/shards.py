"""Tensor parallelism as transformers does it: which process this is, and whether attention heads are split whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .errors import UnsupportedError

_QUERIES, _KEYS, _VALUES = "q_proj", "k_proj", "v_proj"
_FUSED = ("qkv_proj", "query_key_value")
_SPLIT = "colwise"
_GATHERED = ("colwise_gather_output", "colwise_rep")
"""transformers' styles: each process goes on with its own output channels, or with all of them."""


def find_shard(model: Any, modules: Sequence[nn.Module], q_heads: int, kv_heads: int) -> tuple[int, int]:
    """By how many processes the heads of a model are split, and which part this process has.

    Args:
        model: as `from_pretrained(..., distributed_config=DistributedConfig(tp_size=...))` gives it.
        modules: its attention modules.
        q_heads: of the whole model.
        kv_heads: likewise.

    Returns:
        (rank, ranks): heads `rank * heads / ranks` and those after are here; (0, 1) where each process has all heads.

    Raises:
        UnsupportedError: projections that are split in a way that is not known, or within a head.
    """
    ranks = int(getattr(model, "_tp_size", None) or 1)
    if ranks == 1:
        return 0, 1
    inside = set(modules)
    styles = {_style(model, name, module) for name, module in model.named_modules() if module in inside}
    if len(styles) != 1 or None in styles:
        raise UnsupportedError(
            f"hf_longctx: expected queries, keys and values split by heads ('{_SPLIT}') or gathered "
            f"('{_GATHERED[0]}') in every layer of a model over {ranks} processes; got another plan of tensor "
            f"parallelism for '{model.config.model_type}'. Leave tp_plan at 'auto', or use device_map='auto'."
        )
    if styles == {False}:
        return 0, 1
    if q_heads % ranks or kv_heads % ranks:
        raise UnsupportedError(
            f"hf_longctx: expected whole KV heads on each of {ranks} processes; got {kv_heads} KV heads and {q_heads} "
            f"query heads in '{model.config.model_type}'. Use a tp_size that divides {kv_heads}."
        )
    return int(mesh_of(model).get_local_rank()), ranks


def _style(model: Any, name: str, module: nn.Module) -> bool | None:
    """True: each process has heads of its own; False: all of them; None: not known."""
    names = {child.rpartition(".")[2] for child, _ in module.named_modules()}
    fused = [child for child in _FUSED if child in names]
    wanted = fused or [_QUERIES, _KEYS, _VALUES]
    found = {style_of(model, f"{name}.{child}") for child in wanted if child in names}
    if found == {_SPLIT} and set(wanted) <= names:
        return True
    return False if found and found <= {None, *_GATHERED} else None


def mesh_of(model: Any) -> Any:
    """Transformers' own mesh of the processes among which the model is split; None: it is whole."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None or (getattr(model, "_tp_size", None) or 1) == 1:
        return None
    return mesh if mesh.ndim == 1 else mesh["tp"]


def style_of(model: Any, name: str) -> str | None:
    """How transformers splits a module of a model, by the module's name; None: not at all."""
    plan: dict[str, str] = model._tp_plan or {}
    for key in (name, ".".join("*" if part.isdigit() else part for part in name.split("."))):
        if key in plan:
            return plan[key]
    return None
