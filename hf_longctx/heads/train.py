"""Find which KV heads need all keys, by training: gates that should close, unless the model then loses a pass key.

Paper: DuoAttention (arXiv:2410.10819) §2.2.
Differs: the loss is the mean squared distance plus the mean of the gates, as in the released code, not sums; gates are
clamped after each step, so that those that are written are in [0, 1]; streaming heads see exactly sink + window tokens.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor
from torch.optim import AdamW

from ..evals.results import meta, save_json
from ..evals.runner import bar, model_name
from ..evals.team import first
from ..methods.layouts import require_full_attention
from ..models import inspect_model
from .gates import ROLE, Gates, distance, frozen
from .lessons import Lesson, Lessons, Task
from .pattern import DEFAULT_SINK, DEFAULT_WINDOW, HeadPattern, message
from .pattern_io import save_pattern
from .replay import Replay
from .training_state import STATE_FILE, State, load_state, save_state

LONGEST = 32000
"""Tokens of the longest published lesson."""

_LEAST = 0.1
"""Share of the learning rate at which warm-up begins and decay ends."""


@dataclass(frozen=True)
class Settings:
    """How gates are trained; the defaults are those of the published patterns.

    Attributes:
        steps: of the optimizer.
        rate: learning rate between warm-up and decay.
        warmup: steps over which it grows to that; None: a fifth of all.
        decay: last steps, over which it falls; None: a fifth of all.
        weight: of the mean gate, beside the distance.
        sink: first tokens that a streaming head sees.
        window: last tokens that it sees.
        accumulate: lessons of each process in a step.
        recompute: run layers again in the backward pass, in place of holding what they computed.
        save_every: steps from one saved state to the next.
    """

    steps: int = 2000
    rate: float = 0.02
    warmup: int | None = None
    decay: int | None = None
    weight: float = 0.05
    sink: int = DEFAULT_SINK
    window: int = DEFAULT_WINDOW
    accumulate: int = 1
    recompute: bool = True
    save_every: int = 50

    def __post_init__(self) -> None:
        least = {
            "steps": 1,
            "warmup": 0,
            "decay": 0,
            "weight": 0,
            "sink": 0,
            "window": 1,
            "accumulate": 1,
            "save_every": 1,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not bound <= value < math.inf:
                raise ValueError(message("heads train", f"{name} of at least {bound}", repr(value), "Change it"))
        if not 0 < self.rate < math.inf:
            raise ValueError(message("heads train", "rate above 0", repr(self.rate), "Change it"))

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, from 0 on: up in a line, flat, down in a line."""
        warmup, decay = (self.steps / 5 if n is None else n for n in (self.warmup, self.decay))
        up = (step + 1) / warmup if warmup else 1.0
        down = (self.steps - step) / decay if decay else 1.0
        return self.rate * min(1.0, max(up, _LEAST), max(down, _LEAST))


def run(
    model: Any,
    lessons: Lessons,
    settings: Settings,
    out: Path,
    about: dict[str, Any] | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> HeadPattern:
    """Train the gates of a model and write them as a pattern; under `accelerate launch`, in several processes.

    The folder also has `training.safetensors`, the state after every `save_every` steps, and `run_meta.json`.

    Args:
        model: an unpatched causal language model; it is as it was afterwards.
        lessons: what it reads.
        settings: how gates are trained.
        out: folder, made if need be.
        about: of the text, for `run_meta.json` and for a resumed run.
        resume: go on from the state that the folder has, if it has one.
        console: where the bar goes.

    Returns:
        The pattern, which `DuoAttention(pattern=out)` loads.

    Raises:
        ValueError: settings that do not fit, a state of other settings, or a state although `resume` is False.
        UnsupportedError: the model has no heads to train, or cannot be patched.
        RuntimeError: the loss or its gradient is not finite; the last saved state stays.
    """
    from .. import patched

    widths, trained = _check_fit(model, lessons, settings)
    accelerator = _processes()
    asked = _asked(model, lessons, settings, accelerator, about or {})
    gates = Gates(trained).to(model.device)
    state = State(gates, AdamW(gates.parameters(), lr=settings.rate, weight_decay=0.0))
    path, writes = out / STATE_FILE, accelerator.is_main_process
    _go_on(state, path, asked, resume)
    if writes:
        save_json(out / "run_meta.json", {"train": meta(model.device, asked)})
    steps = _Steps(model, lessons, settings, accelerator, state)
    with patched(model, "dense"), frozen(model), bar(console if writes else None) as shown:
        task = shown.add_task("gates", total=settings.steps, completed=state.step, said="")
        while state.step < settings.steps:
            steps.take()
            if writes and (state.step % settings.save_every == 0 or state.step == settings.steps):
                save_state(state, path, asked)
            said = f"loss {state.losses[-1]:.4f}, {gates.sparsity:.0%} below {ROLE}"
            shown.update(task, completed=state.step, said=said)
    pattern = HeadPattern(asked["model"], gates.rows(widths), settings.sink, settings.window, source="heads train")
    if steps.replay.reason is not None and console is not None and writes:
        console.print(f"Steps were not recorded as CUDA graphs: {steps.replay.reason}", markup=False)
    if writes:
        save_pattern(pattern, out, _published(lessons.task, settings))
    return pattern


@dataclass(eq=False)
class _Steps:
    """Steps of the optimizer over the lessons of this process."""

    model: Any
    lessons: Lessons
    settings: Settings
    here: Accelerator
    state: State
    ahead: tuple[int, Lesson] | None = None  # its number, and the next one, made while the device was at work

    def __post_init__(self) -> None:
        self.replay = Replay(self._compare, self.model.device)

    def take(self) -> None:
        """Read the lessons of one step, move the gates, and note the loss.

        Raises:
            RuntimeError: the loss or its gradient is not finite; the gates are as they were.
        """
        settings, here, state = self.settings, self.here, self.state
        # Lessons are dealt out: two processes read in a step what one reads with `accumulate` twice as large.
        first = state.step * settings.accumulate
        numbers = [turn * here.num_processes + here.process_index for turn in range(first, first + settings.accumulate)]
        read = (self.replay(self.lesson(number)) for number in numbers)
        both: Tensor = here.reduce(sum(read) / settings.accumulate, "mean")
        self.ahead = numbers[-1] + here.num_processes, self.lessons[numbers[-1] + here.num_processes]
        loss, *gradient = both.tolist()
        _check_finite(loss, gradient, state, settings)
        for group in state.optimizer.param_groups:
            group["lr"] = settings.rate_at(state.step)
        state.gates.alpha.grad = both[1:]
        state.optimizer.step()
        state.gates.clamp()
        state.losses.append(loss)

    def lesson(self, number: int) -> Lesson:
        """The lesson of a number, which may be there already."""
        return self.ahead[1] if self.ahead is not None and self.ahead[0] == number else self.lessons[number]

    def _compare(self, lesson: Lesson) -> Tensor:
        """The distance with a price for every gate that is open, and the gradient: `[1 + gates]`."""
        gates, settings = self.state.gates, self.settings
        apart = distance(self.model, gates(), lesson, settings.sink, settings.window, settings.recompute)
        loss = apart.to(gates.alpha) + settings.weight * gates.alpha.abs().mean()
        (gradient,) = torch.autograd.grad(loss, gates.alpha)
        return torch.cat((loss.detach()[None], gradient))


def _check_finite(loss: float, gradient: list[float], state: State, settings: Settings) -> None:
    """Stop before a step from which there is no way back."""
    if math.isfinite(loss) and all(map(math.isfinite, gradient)):
        return
    kept = state.step // settings.save_every * settings.save_every
    held = f"{STATE_FILE} holds the state after step {kept}" if kept else "There is no saved state yet"
    where, got = f"heads train, step {state.step + 1}", f"{loss}" if not math.isfinite(loss) else "a gradient without"
    advice = f"Training stopped. {held}. Begin anew with a lower --rate, or with --dtype float32"
    raise RuntimeError(message(where, "a finite loss and gradient", got, advice))


def _check_fit(model: Any, lessons: Lessons, settings: Settings) -> tuple[list[int], list[int]]:
    """KV heads of each layer, and how many of them have gates; refuses what could not be written or teaches nothing."""
    facts = inspect_model(model)
    require_full_attention("heads train", facts)
    widths = [layer.kv_heads for layer in facts.layers]
    if len(set(widths)) > 1:
        advice = "The published format is a rectangle"
        raise ValueError(message("heads train", "equally many KV heads in each layer", f"{widths}", advice))
    seen = settings.sink + settings.window
    if seen >= lessons.task.shortest:
        got, advice = f"{lessons.task.shortest}", "A head that streams would see all of it: ask for longer ones"
        raise ValueError(message("heads train", f"lessons of more than sink + window = {seen} tokens", got, advice))
    return widths, [0 if layer.window is not None else layer.kv_heads for layer in facts.layers]


def _go_on(state: State, path: Path, asked: dict[str, Any], resume: bool) -> None:
    """Fill the state with a former one, if there is one."""
    if not path.exists():
        return
    if not resume:
        advice = "Pass --resume to go on from it, or another folder"
        raise ValueError(message("heads train", f"no former state in {path}", "one", advice))
    load_state(state, path, asked)


def _asked(
    model: Any, lessons: Lessons, settings: Settings, accelerator: Accelerator, about: dict[str, Any]
) -> dict[str, Any]:
    """What decides about the gates, for `run_meta.json` and for a resumed run."""
    return {
        "model": model_name(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "processes": accelerator.num_processes,
        **asdict(lessons.task),
        **asdict(settings),
        **about,
    }


def _published(task: Task, settings: Settings) -> dict[str, object]:
    """Settings under the names that the published patterns have them by."""
    return {
        "lr": settings.rate,
        "num_steps": settings.steps,
        "reg_weight": settings.weight,
        "context_length_min": task.shortest,
        "context_length_max": task.longest,
        "num_passkeys": task.keys,
        "passkey_length": task.words,
        "initial_value": 1.0,
        "seed": task.seed,
    }


def _processes() -> Accelerator:
    """This process among those that `accelerate launch` started; the model is in place, with numbers of its own."""
    return Accelerator(device_placement=False, mixed_precision="no")


def longest_for(model: Any, shortest: int) -> int:
    """Tokens of the longest lesson where nothing else is asked for: as published, or what the model was made for."""
    positions = getattr(inspect_model(model).config, "max_position_embeddings", None)
    return max(shortest, min(LONGEST, positions or LONGEST))


def publish(pattern: HeadPattern, out: Path, console: Console) -> None:
    """Say how many heads stream, and where the gates are; once, whatever the number of processes."""
    if not first():
        return
    gates = [gate for row in pattern.gates for gate in row]
    streaming = sum(gate < ROLE for gate in gates)
    console.print(f"{streaming} of {len(gates)} KV heads have a gate below {ROLE}. Pattern: {out}", soft_wrap=True)
