"""Teach the scales of a delta what the fine-tune says, from a few hundred short pieces of text.

Paper: BitDelta (arXiv:2402.10193) §3.2: 200 steps of 4 pieces of 128 tokens, mean squared distance of logits.
Differs: the scales alone are trained, as the paper says; its code trains embeddings, head and norms as well (`all`).
Gradients go through the signs to the layers before, where that code drops them. Pieces are whole, in place of padded.
The rate is at most a twentieth of the mean scale: fine-tunes that moved little would be lost in the first steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from .attach import install, remove
from .bits import Matrix
from .embeddings import Table
from .experts import EXPERT, Experts
from .format import Delta
from .message import say
from .signs import Signs
from .tables import Norm, Weights
from .tenants import Deltas

_PUPIL = "pupil"
_SHARE = 0.05
TRAINED = ("scales", "all")


@dataclass(frozen=True)
class Lessons:
    """How scales are taught; the defaults are the paper's.

    Attributes:
        steps: of the optimizer.
        batch: pieces of text in a step.
        tokens: of a piece.
        rate: learning rate at the start; it falls to zero as a cosine.
        train: `scales`, or `all` that is not signs: embeddings, head, norms and biases too, which are then all stored.
        seed: draws where pieces begin.
    """

    steps: int = 200
    batch: int = 4
    tokens: int = 128
    rate: float = 1e-4
    train: str = "scales"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("tokens", 2)):
            if getattr(self, name) < least:
                raise ValueError(say("delta distil", f"{name} of at least {least}", getattr(self, name), "Change it"))
        if not 0 < self.rate < 1:
            raise ValueError(say("delta distil", "a rate above 0 and below 1", self.rate, "Change it"))
        if self.train not in TRAINED:
            raise ValueError(say("delta distil", f"one of {', '.join(TRAINED)}", repr(self.train), "Change --train"))


def distil(
    base: Any,
    teacher: Any,
    delta: Delta,
    ids: Tensor,
    lessons: Lessons,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Delta:
    """A delta with other scales, whose model says what the fine-tune says.

    Args:
        base: the model that it is a difference from, without tenants; it is as it was afterwards.
        teacher: the fine-tune, on the same device.
        delta: where to begin.
        ids: `[n]`, int64, a text in tokens of the fine-tune.
        lessons: how.
        on_step: told each step, from 1 on, and its loss.

    Raises:
        ValueError: the text is shorter than a piece, or the delta is not one of the base.
        RuntimeError: a loss is not finite.
    """
    if len(ids) < lessons.tokens:
        raise ValueError(
            say("delta distil", f"a text of at least {lessons.tokens} tokens", len(ids), "Pass a longer one")
        )
    began = delta
    if lessons.train == "all":
        delta = _whole(delta, teacher)
        began = replace(delta, dense={name: delta.weight(name) for name in delta.dense}, int8={})
    state = install(base, {_PUPIL: began}, 1)
    wanted = [x.requires_grad for x in base.parameters()]
    training = base.training, teacher.training
    try:
        state.active = _PUPIL
        base.requires_grad_(False).eval()
        teacher.eval()
        trained = list(_trained(state, lessons.train))
        _teach(base, teacher, trained, _pieces(ids, lessons), lessons, on_step)
        return _taken(state, delta)
    finally:
        remove(base)
        for x, want in zip(base.parameters(), wanted, strict=True):
            x.requires_grad_(want)
        base.train(training[0])
        teacher.train(training[1])


def _teach(
    pupil: Any,
    teacher: Any,
    trained: list[nn.Parameter],
    pieces: Iterator[Tensor],
    lessons: Lessons,
    on_step: Callable[[int, float], None],
) -> None:
    """The steps of the optimizer."""
    means = [x.detach().abs().mean() for x in trained if x.dtype == torch.float32 and x.ndim in (4, 5)]
    rate = min(lessons.rate, _SHARE * float(torch.stack(means).mean())) if means else lessons.rate
    optimizer = AdamW(trained, lr=rate, weight_decay=0.0)
    falling = CosineAnnealingLR(optimizer, lessons.steps)
    for step, piece in enumerate(pieces, 1):
        batch = piece.to(pupil.device)
        with torch.no_grad():
            said = teacher(batch, use_cache=False).logits.float()
        heard = pupil(batch, use_cache=False).logits[..., : said.shape[-1]].float()
        loss = (heard - said).square().mean()
        if not bool(loss.isfinite()):
            advice = "Nothing was written. Try a lower --rate, or --dtype float32"
            raise RuntimeError(say(f"delta distil, step {step}", "a finite loss", float(loss), advice))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
        on_step(step, float(loss.detach()))


def _pieces(ids: Tensor, lessons: Lessons) -> Iterator[Tensor]:
    """Batches of pieces that begin anywhere in a text; the same for the same seed."""
    made = torch.Generator().manual_seed(lessons.seed)
    for _ in range(lessons.steps):
        starts = torch.randint(len(ids) - lessons.tokens + 1, (lessons.batch,), generator=made)
        yield torch.stack([ids[start : start + lessons.tokens] for start in starts.tolist()])


def _whole(delta: Delta, teacher: Any) -> Delta:
    """A delta that leaves nothing to the base but what signs are added to."""
    experts = {found["module"] for name in delta.matrices if (found := EXPERT.fullmatch(name))}
    rest = [(name, x) for name, x in teacher.named_parameters() if name.rpartition(".")[0] not in experts]
    own = {name: x for name, x in rest if name not in delta.matrices}
    dense = {name: x.detach().to("cpu", torch.bfloat16) for name, x in own.items()}
    return replace(delta, dense={**dense, **delta.dense})


def _trained(state: Deltas, train: str) -> Iterator[nn.Parameter]:
    """What is trained, put into the hooks as parameters."""
    state.enter(1)  # brings the tenant
    for key, hook in state.hooks.items():
        if isinstance(hook, Experts):
            yield from hook.trained(state.parts(next(iter(state.tenants)), key))
        if isinstance(hook, Signs) and 0 in hook.shapes:
            grain = hook.shapes[0][1:]
            hook.scales[grain] = made = _parameter(hook.scales[grain])
            yield made
        if train == "scales":
            continue
        if isinstance(hook, Signs) and hook.bias is not None:
            hook.bias = nn.Parameter(hook.bias)
            yield hook.bias
        elif isinstance(hook, Table):
            for rows in hook.kinds.values():
                rows.values = nn.Parameter(rows.values)
                yield rows.values
        elif isinstance(hook, Norm) and hook.tables is not None:
            hook.tables = {name: nn.Parameter(x) for name, x in hook.tables.items()}
            yield from hook.tables.values()  # type: ignore[misc]
        elif isinstance(hook, Weights):
            own = {name: nn.Parameter(x.clone()) for name, x in hook.held.get(0, {}).items()}  # not the delta's own
            hook.held = {0: dict(own)}
            yield from own.values()


def _parameter(scales: Tensor) -> nn.Parameter:
    """Scales to be trained; those of zero, where nothing differs, stay."""
    made = nn.Parameter(scales)
    made.register_hook(lambda grad, mask=scales != 0: grad * mask)  # type: ignore[no-untyped-call]
    return made


@torch.no_grad()
def _taken(state: Deltas, delta: Delta) -> Delta:
    """A delta with what is in the hooks of its one slot."""
    matrices, dense, int8 = dict(delta.matrices), dict(delta.dense), dict(delta.int8)
    for key, hook in state.hooks.items():
        held: dict[str, Tensor] = {}
        if isinstance(hook, Signs):
            name = f"{key}.weight"
            if 0 in hook.shapes and name in matrices:
                bits = matrices[name].bits
                matrices[name] = Matrix(bits, hook.scales[hook.shapes[0][1:]][0, : len(bits)].cpu().clone())
            if isinstance(hook.bias, nn.Parameter):
                own: Any = getattr(hook.module, "bias", None)
                held["bias"] = hook.bias[1] + (0 if own is None else own.float())
        elif isinstance(hook, Experts):
            found = hook.taught(state.parts(next(iter(state.tenants)), key))
            matrices |= {f"{key}.{name}.weight": matrix for name, matrix in found.items()}
        elif isinstance(hook, Table):
            for rows in hook.kinds.values():
                if isinstance(rows.values, nn.Parameter):
                    held["weight"] = rows.values[0, : rows.own[0]]
        elif isinstance(hook, Norm) and hook.tables is not None:
            held = {part: x[1] for part, x in hook.tables.items() if isinstance(x, nn.Parameter)}
        elif isinstance(hook, Weights):
            held = {part: x for part, x in hook.held.get(0, {}).items() if isinstance(x, nn.Parameter)}
        for part, x in held.items():
            name = f"{key}.{part}"
            if name in dense:
                like = torch.bfloat16 if int8.pop(name, None) is not None else dense[name].dtype
                dense[name] = x.cpu().to(like).clone()
    return replace(delta, matrices=matrices, dense=dense, int8=int8)
