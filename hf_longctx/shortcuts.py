"""Short cuts: one launch in place of the many small ones of a norm, a rotation, a gate, or of a step's linear layer.

Nothing is known of a model here. What its norms and rotations do is seen on random numbers: where they give, bit for
bit, what an operation of ours is defined to give, calls go there. Those that want gradients or are compiled run the
model's own code. Only attributes of instances are set, so nothing stays behind. Linear layers and MLPs are in
`projections.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from . import projections, shortcut
from .context import current
from .kernels import ops
from .kernels.compiled import library
from .kernels.reference.norm import rms_norm
from .kernels.reference.rotate import rotate_heads
from .shortcut import DTYPES, ShortCut, gives, random
from .turning import UNTURNED

_ROTATE = "apply_rotary_pos_emb"


def install(decoder: Any) -> None:
    """Put short cuts in the place of what is proved to be the same; no-op on devices that have none."""
    if decoder.device.type not in shortcut.DEVICES or library.reason(decoder.device) is not None:
        return
    known: dict[Any, Any] = {}
    for module in list(decoder.modules()):
        found = projections.find(module, known)
        own = _norm(module, known) or _rotation(module, known)
        for place, cut in (*found.items(), *(() if own is None else ((module, own),))):
            place.__dict__.setdefault("forward", cut)  # unless somebody else has put something there


def remove(decoder: nn.Module) -> None:
    """Give every module its class's `forward` back, also beneath a hook of accelerate's."""
    for module, name in _places(decoder):
        if name == "forward":
            del module.__dict__[name]
        else:
            module.__dict__[name] = MethodType(type(module).forward, module)


def count(decoder: nn.Module) -> tuple[int, int, int]:
    """How many norms, how many rotations and how many linear layers have a short cut."""
    cuts = [type(vars(module)[name]) for module, name in _places(decoder)]
    return sum(issubclass(x, Norm) for x in cuts), cuts.count(Rotation), cuts.count(projections.Product)


def _places(decoder: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for module in decoder.modules():
        for name in ("forward", "_old_forward"):
            if isinstance(vars(module).get(name), ShortCut):
                yield module, name


# norms ------------------------------------------------------------------------------------------------------------

_FORMS = ((0.0, True), (0.0, False), (1.0, False))
"""Offset and `early` of `ops.rms_norm`: Llama's, OLMo 2's, Gemma's."""


@dataclass(eq=False)
class Norm(ShortCut):
    """In place of a norm's `forward`; fields as `ops.rms_norm` has them."""

    eps: float
    offset: float
    early: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One launch, or the norm's own."""
        if kwargs or not self.due():
            return self.stock(*args, **kwargs)
        weight, of_row = self.weights(args[0])
        return ops.rms_norm(args[0], weight, self.eps, self.offset, self.early, of_row)

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The norm's, or those that a hook names, and which of them each row has."""
        for hook in self.module._forward_hooks.values():
            named = getattr(getattr(hook, "__self__", None), "weights_of_rows", None)
            if named is not None:
                return named(x)  # type: ignore[no-any-return]
        return self.module.weight, None  # type: ignore[return-value]


def _norm(module: nn.Module, known: dict[Any, Any]) -> Norm | None:
    """The short cut of a module that is a norm and computes in a form that is known."""
    weight, kind = module._parameters.get("weight"), type(module)
    plain = len(module._parameters) == 1 and not module._buffers and not module._modules
    if not kind.__name__.endswith("RMSNorm") or isinstance(module, nn.RMSNorm) or not plain:
        return None  # torch's own is one launch already
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if type(weight) is not nn.Parameter or weight.ndim != 1 or not isinstance(eps, float):
        return None
    if list(inspect.signature(kind.forward).parameters.values())[2:]:
        return None
    settings = {name: x for name, x in vars(module).items() if isinstance(x, bool | int | float | str)}
    key = kind, len(weight), tuple(sorted(settings.items()))
    if key not in known:
        known[key] = next((form for form in _FORMS if _norms(module, len(weight), eps, *form)), None)
    return None if known[key] is None else Norm(module, eps, *known[key])


def _norms(module: nn.Module, dim: int, eps: float, offset: float, early: bool) -> bool:
    """True if a norm computes in a form, whatever the dtypes of its input and its weight."""
    spread = torch.tensor([[1e-3], [1.0], [30.0]], device="cpu")  # where eps counts, and where it does not
    made = torch.Generator().manual_seed(0)
    x, weight = spread * random(made, 2, 3, dim), random(made, dim)
    pairs = [(x.to(dtype), weight.to(dtype)) for dtype in DTYPES] + [(x.to(torch.bfloat16), weight)]
    for rows, scale in pairs:
        probed = copy(module)
        probed.__dict__["_parameters"] = {"weight": nn.Parameter(scale, requires_grad=False)}
        expected = rms_norm(rows, scale, eps, offset, early)
        if not gives(partial(type(module).forward, probed, rows), expected):
            return False
    return True


# rotations --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Same:
    """Where a function is the same as `ops.rotate_heads`.

    Args:
        whole: where cos has as many channels as a head.
        part: where it has fewer, and the other channels stay.
        pairs: where it has half as many, one for each pair.
        wide: in these cases also with cos in float32 for queries of 16 bits.
    """

    whole: bool
    part: bool
    pairs: bool
    wide: bool

    def size(self, width: int, dim: int) -> int:
        """How many of `dim` channels turn if cos has `width`; 0: that is not known."""
        if width == dim:
            return dim if self.whole else 0
        if self.pairs and 2 * width == dim:
            return dim
        return width if self.part and width < dim else 0


@dataclass(frozen=True)
class Turn:
    """In place of a function `apply_rotary_pos_emb`, `stock`."""

    stock: Callable[..., Any]
    same: Same

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        """One launch, none where nothing turns, or the function's own."""
        forward = current()
        if forward is not None and forward.memo.get(UNTURNED) is cos:
            return q, k
        size = self.same.size(cos.shape[-1], q.shape[-1])
        wide = self.same.wide and cos.dtype == torch.float32
        alike = q.dtype == k.dtype and cos.dtype == sin.dtype and (wide or cos.dtype == q.dtype)
        if size and alike and unsqueeze_dim == 1 and cos.ndim == 3 and q.ndim == 4:
            return ops.rotate_heads(q, k, cos, sin, size)
        return self.stock(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)


class Rotation(ShortCut):
    """In place of an attention's `forward`: the same code, with ours for the function that it knows by name."""

    def __init__(self, module: nn.Module, same: Same) -> None:
        super().__init__(module)
        self.same = same
        own, self._renamed = unwrapped(type(module).forward)
        names = {**own.__globals__, _ROTATE: Turn(own.__globals__[_ROTATE], same)}
        self._run = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
        self._run.__kwdefaults__ = own.__kwdefaults__

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "same": self.same}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__init__(**values)  # type: ignore[misc]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The attention's forward."""
        due = self.due() and self._renamed.isdisjoint(kwargs)
        return self._run(self.module, *args, **kwargs) if due else self.stock(*args, **kwargs)


def unwrapped(forward: Any) -> tuple[Any, frozenset[str]]:
    """A function without transformers' translation of arguments that it has renamed, and their names before."""
    names = set()
    while hasattr(forward, "__wrapped__"):
        knows = inspect.getclosurevars(forward).nonlocals
        if not {"old_name", "new_name", "func"} <= knows.keys() or knows["func"] is not forward.__wrapped__:
            break
        names.add(knows["old_name"])
        forward = forward.__wrapped__
    return forward, frozenset(names)


def _rotation(module: nn.Module, known: dict[Any, Any]) -> Rotation | None:
    """The short cut of a module whose own code rotates with a function that is known."""
    own, _ = unwrapped(type(module).forward)
    if not isinstance(own, FunctionType) or _ROTATE not in own.__code__.co_names:
        return None
    stock = own.__globals__.get(_ROTATE)
    if stock not in known:
        known[stock] = _same(stock)
    return None if known[stock] is None else Rotation(module, known[stock])


def _same(stock: Any) -> Same | None:
    """Where a function, or a module in its place, is the same as `ops.rotate_heads`; None: nowhere."""
    run = stock.forward if isinstance(stock, nn.Module) else stock
    names = ["q", "k", "cos", "sin", "unsqueeze_dim"]
    if not isinstance(run, FunctionType | MethodType) or list(inspect.signature(run).parameters) != names:
        return None
    dim = 32
    kinds = {"whole": (dim, dim), "part": (dim // 2, dim // 2), "pairs": (dim // 2, dim)}
    alike = [(dtype, dtype) for dtype in DTYPES]
    same = {name: _turns(stock, dim, *sizes, alike) for name, sizes in kinds.items()}
    if not any(same.values()):
        return None
    mixed = [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
    return Same(**same, wide=all(_turns(stock, dim, *kinds[name], mixed) for name in kinds if same[name]))


def _turns(
    stock: Callable[..., Any], dim: int, width: int, size: int, dtypes: list[tuple[torch.dtype, torch.dtype]]
) -> bool:
    """True if a function gives what `ops.rotate_heads` does, for all dtypes of heads and angles."""
    made = torch.Generator().manual_seed(0)
    for heads, angles in dtypes:
        q, k = (random(made, 2, n, 3, dim).to(heads) for n in (4, 2))
        for rows in (1, 2):
            cos, sin = (random(made, rows, 3, width).to(angles) for _ in range(2))
            expected = rotate_heads(q, k, cos, sin, size)
            calls = partial(stock, q, k, cos, sin), partial(stock, q, k, cos, sin, unsqueeze_dim=1)
            if not all(gives(call, *expected) for call in calls):
                return False
    return True
