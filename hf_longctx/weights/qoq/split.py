"""Quantized layers under transformers' tensor parallelism: each process keeps rows or columns of the codes.

The loader would cut stored bytes, whose order is one of whole panels; so layers are loaded whole, cut as codes, and
then handed to the style that transformers' plan has for them, which moves inputs and outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from ...errors import UnsupportedError
from ...kernels.linear import Codes
from ...kernels.packing import pack, unpack
from ...shards import mesh_of, style_of

if TYPE_CHECKING:
    from .linear import QoQLinear

_BY_ROWS = ("colwise", "colwise_gather_output", "colwise_rep")
_BY_COLUMNS = ("rowwise", "rowwise_rep", "rowwise_split_input")


@dataclass
class Split:
    """How a model's quantized layers are to be cut.

    Attributes:
        styles: transformers' name of the way, by layer; the layers that are not here stay whole.
        rules: what the plan said of them, taken out of it while weights are loaded.
    """

    styles: dict[str, str] = field(default_factory=dict)
    rules: dict[str, str] = field(default_factory=dict)

    @classmethod
    def take(cls, model: Any, chosen: list[str]) -> Split:
        """Take the layers out of the model's plan, so that the loader leaves them whole."""
        styles = {name: style for name in chosen if (style := style_of(model, name)) is not None}
        plan: dict[str, str] = model._tp_plan or {}
        keys = {_rule(name) for name in styles}
        made = cls(styles, {key: plan.pop(key) for key in keys if key in plan})
        made._others = [name for name, _ in model.named_modules() if _rule(name) in made.rules and name not in styles]
        return made

    def __post_init__(self) -> None:
        self._others: list[str] = []

    def apply(self, model: Any) -> None:
        """Give the plan its rules back and, on a model that is split, cut the layers.

        Raises:
            UnsupportedError: a layer that cannot be cut, or one of a kind that is quantized in other layers.
        """
        model._tp_plan = {**(model._tp_plan or {}), **self.rules}
        mesh = mesh_of(model)
        if mesh is None:
            return
        ranks = int(mesh.size())
        if self._others:
            raise UnsupportedError(
                f"QoQ: expected layers of a kind all quantized or none, to be split over {ranks} processes; got "
                f"{self._others[0]} left out. Leave out all of its kind, or use one process."
            )
        for name, style in self.styles.items():
            _check(name, model.get_submodule(name), style, ranks)
        from transformers.distributed import tensor_parallel

        ways: Any = tensor_parallel.ALL_PARALLEL_STYLES  # type: ignore[attr-defined] # it is only handed on there
        for name, style in self.styles.items():
            module: Any = model.get_submodule(name)
            _cut(module, style, int(mesh.get_local_rank()), ranks)
            module._hf_quantized_needs_local_tp = True  # transformers: it computes on what is here
            ways[style].install_forward(module, mesh)


def require_whole_model(model: Any, where: str) -> None:
    """Refuse what needs the whole weights.

    Raises:
        UnsupportedError: processes share them.
    """
    mesh = mesh_of(model)
    if mesh is not None:
        raise UnsupportedError(
            f"{where}: expected a QoQ model that is whole in this process; got one over {mesh.size()} processes. "
            "Load it without tensor parallelism."
        )


def _rule(name: str) -> str:
    """A module's name as plans have it."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _check(name: str, module: Any, style: str, ranks: int) -> None:
    """Refuse a layer that cannot be cut into equal parts."""
    unit = 1 if style in _BY_ROWS else max(32, module.group_size)
    size = module.out_features if style in _BY_ROWS else module.in_features
    if style not in (*_BY_ROWS, *_BY_COLUMNS):
        raise UnsupportedError(
            f"QoQ: expected a layer that is split by rows or columns; got '{style}' for {name}. Use one process."
        )
    if size % (unit * ranks):
        raise UnsupportedError(
            f"QoQ: expected {'output' if unit == 1 else 'input'} channels of {name} in multiples of {unit} on each of "
            f"{ranks} processes; got {size}. Use fewer processes or a smaller group_size."
        )


def _cut(module: QoQLinear, style: str, rank: int, ranks: int) -> None:
    """Leave this process's part in a layer; its sizes still say what the whole layer has."""
    from .linear import parts_of

    codes = unpack(module.packed)
    rows, columns = codes.values.shape
    if style in _BY_ROWS:
        here = slice(rank * rows // ranks, (rank + 1) * rows // ranks)
        part = Codes(*(None if x is None else x[here] for x in vars(codes).values()))  # type: ignore[arg-type]
        if module.bias is not None:
            module.bias = nn.Parameter(module.bias.data[here].clone(), module.bias.requires_grad)
    else:
        module.width = columns // ranks
        levels = (codes.values, codes.group_scale, codes.group_zero)
        values, scale, zero = (None if x is None else x.chunk(ranks, 1)[rank].contiguous() for x in levels)
        assert values is not None
        part = Codes(values, codes.scale, codes.shift, scale, zero)
    for name, tensor in parts_of(pack(part)).items():
        setattr(module, name, nn.Parameter(tensor, requires_grad=False))
