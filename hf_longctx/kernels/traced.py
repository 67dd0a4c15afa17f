"""The operations as a compiler sees them: `torch.ops.hf_longctx.*`, one `torch.library` operation for each.

Calls that nobody traces do not come by here: a registered operation takes some 14 us of the host's time, more than many
of ours take in all. A call that is traced becomes one node of the graph, which runs, when the graph does, on whatever
backend takes its arguments then. What a graph cannot hold runs between two of them, and the compiler is told why.

They are registered when this is imported, which the first traced call does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from . import dispatch, outputs
from .between import between_graphs
from .linear import Tokens
from .reference import OPS as DEFINITIONS
from .schemas import Part, parts_of, schema
from .step import GroupStep
from .types import HostBlocks, Packed

NAMESPACE = "hf_longctx"


@dataclass(frozen=True)
class Row:
    """What a compiler must know of an operation.

    Args:
        outputs: what comes out, by the same arguments.
        returns: plain types of that.
        changed: what is changed in place, as `schemas.parts_of` has it.
        tokens_first: the first result lies in memory as `[B, T, H, D]`; all others are contiguous.
    """

    outputs: Callable[..., Any]
    returns: str = "Tensor"
    changed: frozenset[str] = frozenset()
    tokens_first: bool = False


_TWO, _THREE, _FOUR = ("(" + ", ".join(["Tensor"] * n) + ")" for n in (2, 3, 4))
_BLOCKS = frozenset({"k", "v"})

TABLE = {
    "attend_blocks": Row(outputs.attend, tokens_first=True),
    "attend_heads": Row(outputs.nothing, "()", frozenset({"out"})),
    "attend_pages": Row(outputs.attend, tokens_first=True),
    "attend_mass": Row(outputs.attend_mass, _TWO, tokens_first=True),
    "attend_recent": Row(outputs.attend, tokens_first=True),
    "step_recent": Row(outputs.attend, changed=frozenset({"far_k", "far_v", "near_k", "near_v"}), tokens_first=True),
    "attend_layer": Row(
        outputs.attend_layer, changed=frozenset({"groups.k", "groups.v", "groups.bounds", "groups.ids"})
    ),
    "score_pages": Row(outputs.score_pages),
    "score_antidiagonal": Row(outputs.score_antidiagonal),
    "pick_blocks": Row(outputs.pick_blocks),
    "count_blocks": Row(outputs.nothing, "()", frozenset({"tally"})),
    "rotate": Row(outputs.like_first),
    "rotate_heads": Row(outputs.rotate_heads, _TWO),
    "rms_norm": Row(outputs.rms_norm),
    "gated": Row(outputs.like_first),
    "project": Row(outputs.project, "Tensor[]"),
    "project_gated": Row(outputs.project_gated),
    "append": Row(outputs.nothing, "()", frozenset({"store"})),
    "fill_pages": Row(outputs.nothing, "()", frozenset({"groups.k", "groups.v", "groups.bounds", "read"})),
    "append_pages": Row(outputs.nothing, "()", frozenset({"k_store", "v_store", "bounds"})),
    "bring_blocks": Row(outputs.bring_blocks, changed=_BLOCKS | {"pool", "counts"}),
    "copy_blocks": Row(outputs.nothing, "()", _BLOCKS | {"host.segments"}),
    "encode_kv": Row(outputs.encode_kv, _THREE),
    "decode_kv": Row(outputs.decode_kv),
    "delta_linear": Row(outputs.delta_linear),
    "linear_with_delta": Row(outputs.linear_with_delta),
    "linears_with_delta": Row(outputs.linears_with_delta, "Tensor[]"),
    "linear_of_rows": Row(outputs.linear_of_rows),
    "quantize_tokens": Row(outputs.quantize_tokens, _THREE),
    "quantize_norm": Row(outputs.quantize_norm, _FOUR),
    "quantize_gated": Row(outputs.quantize_tokens, _THREE),
    "w4a8_linear": Row(outputs.w4a8_linear),
    "w4a8_linears": Row(outputs.w4a8_linears, "Tensor[]"),
    "w4a8_linears_of": Row(outputs.w4a8_linears_of, "Tensor[]"),
    "sort_experts": Row(outputs.sort_experts, _THREE),
    "w4a8_experts": Row(outputs.w4a8_experts),
    "combine_experts": Row(outputs.combine_experts),
}


class Operation:
    """One operation, registered.

    Attributes:
        overload: what a graph calls.
        parts: its arguments.
    """

    def __init__(self, name: str, row: Row, definition: Callable[..., Any], run: Callable[..., Any]) -> None:
        self.name, self.row, self.parts = name, row, parts_of(definition, row.changed)
        self._run = run
        said = schema(self.parts, row.returns)
        changed = [name for part in self.parts for name, _, touched in part.names if touched]
        made = torch.library.custom_op(f"{NAMESPACE}::{name}", self._real, mutates_args=changed, schema=said)
        made.register_fake(self._fake)
        self.overload = getattr(getattr(torch.ops, NAMESPACE), name).default

    def _real(self, *flat: Any) -> Any:
        """What it computes, in new memory, laid out as was said."""
        found = _tensors(self._run(*self._built(flat)))
        memory = {x.untyped_storage().data_ptr() for x in _inputs(flat)}
        laid = []
        for number, x in enumerate(found):
            x = x.clone() if x.untyped_storage().data_ptr() in memory else x
            first = self.row.tokens_first and number == 0
            laid.append(x.transpose(1, 2).contiguous().transpose(1, 2) if first else x.contiguous())
        return self._given(laid)

    def _fake(self, *flat: Any) -> Any:
        """The same without numbers."""
        return self._given(_tensors(self.row.outputs(*self._built(flat))))

    def _built(self, flat: Sequence[Any]) -> list[Any]:
        left = iter(flat)
        return [part.build(left) for part in self.parts]

    def _given(self, found: list[Tensor]) -> Any:
        if self.row.returns == "Tensor[]":
            return found
        return None if not found else found[0] if len(found) == 1 else tuple(found)


def _tensors(x: Any) -> list[Tensor]:
    """All tensors of a result, in their order."""
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, Tokens | Packed):
        return [one for field in fields(x) for one in _tensors(getattr(x, field.name))]
    return [one for each in x for one in _tensors(each)] if isinstance(x, list | tuple) else []


def _inputs(flat: Sequence[Any]) -> list[Tensor]:
    return [one for x in flat for one in (x if isinstance(x, list | tuple) else [x]) if isinstance(one, Tensor)]


def _operation(name: str) -> Operation:
    return Operation(name, TABLE[name], DEFINITIONS[name].run, lambda *args: dispatch.run(name, *args))


OPERATIONS = {name: _operation(name) for name in dispatch.OPS}


def flatten(parts: Sequence[Part], args: Sequence[Any]) -> list[Any]:
    """Arguments as the registered operation takes them."""
    return [x for part, arg in zip(parts, args, strict=True) for x in part.take(arg)]


def call(name: str, args: tuple[Any, ...]) -> Any:
    """A call that is traced: one node, or, where that cannot be, the call as ever, outside the graph."""
    operation = OPERATIONS[name]
    if name == "attend_layer":
        _check_bounds(args[4])
    flat = flatten(operation.parts, args)
    if torch.is_grad_enabled() and any(x.requires_grad for x in _inputs(flat)):
        return outside_for_gradients(name, *args)
    if any(_has_table(x) for x in args):
        return outside_for_addresses(name, *args)
    out = operation.overload(*flat)
    return _restored(name, args, out)


def _check_bounds(groups: Sequence[GroupStep]) -> None:
    if any(group.choice is not None and group.choice.summary is not group.bounds for group in groups):
        raise ValueError(
            "attend_layer: expected a choice by the bounds of its group; got another summary, which a compiler would "
            "take for one that the call does not change. Pass the bounds themselves."
        )


def _has_table(x: Any) -> bool:
    return isinstance(x, HostBlocks) and x.table is not None


def _restored(name: str, args: tuple[Any, ...], out: Any) -> Any:
    """A result as `ops.py` has it."""
    if name in ("quantize_tokens", "quantize_gated"):
        return Tokens(*out)
    if name == "quantize_norm":
        return out[0], Tokens(out[1], out[2], out[3])
    if name == "encode_kv":
        return Packed(out[0], out[1], out[2], args[1], args[0].dtype)
    return tuple(out) if name in ("project", "linears_with_delta") else out


@between_graphs("operations have no gradient in a graph; they are recorded outside it")
def outside_for_gradients(name: str, *args: Any) -> Any:
    """The call as ever."""
    return dispatch.run(name, *args)


@between_graphs("blocks in host memory are read at their own addresses, which no graph sees")
def outside_for_addresses(name: str, *args: Any) -> Any:
    """The call as ever."""
    return dispatch.run(name, *args)
