"""How far the training of gates has come, on the disk: no pickle, and the old file stays until the new one is whole."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.optim import Optimizer

from ..files import replacing
from .gates import Gates
from .pattern import message

STATE_FILE = "training.safetensors"
_OPTIMIZER = "optimizer."
_ABOUT = "about"


@dataclass
class State:
    """All that the next step depends on: lessons are drawn by their number, so there is no state of a generator.

    Attributes:
        gates: that are trained.
        optimizer: of their one parameter.
        losses: of all steps so far.
    """

    gates: Gates
    optimizer: Optimizer
    losses: list[float] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Steps that are done."""
        return len(self.losses)


def save_state(state: State, path: Path, about: dict[str, Any]) -> None:
    """Write it in one step; a failure leaves the old file.

    Args:
        state: after at least one step.
        path: of the file.
        about: settings, which a resumed run must share.
    """
    moments = state.optimizer.state_dict()["state"][0]
    tensors = {
        "gates": state.gates.alpha.detach(),
        "losses": torch.tensor(state.losses, dtype=torch.float64),
        **{_OPTIMIZER + name: value for name, value in moments.items()},
    }
    content = save({name: x.cpu().contiguous() for name, x in tensors.items()}, {_ABOUT: json.dumps(about)})
    with replacing(path) as scratch, open(scratch, "wb") as stream:
        stream.write(content)


def load_state(state: State, path: Path, about: dict[str, Any]) -> None:
    """Bring gates, optimizer and losses to where they were.

    Args:
        state: fresh; it is filled.
        path: of the file.
        about: settings of this run.

    Raises:
        ValueError: the file was made with other settings, or is damaged; nothing was changed.
    """
    advice = "Use the same settings, another folder, or leave out --resume"
    try:
        with safe_open(path, "pt") as file:
            former = json.loads((file.metadata() or {})[_ABOUT])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        gates, losses = tensors.pop("gates"), tensors.pop("losses")
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            message(str(path), "a state of `heads train`", repr(error), "Delete it to begin anew")
        ) from error
    for name, value in json.loads(json.dumps(about)).items():
        if former.get(name) != value:
            made, found = f"{path} to be made with {name}={value!r}", repr(former.get(name))
            raise ValueError(message("--resume", made, found, advice))
    moments = {name.removeprefix(_OPTIMIZER): x for name, x in tensors.items()}
    state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": {0: moments}})
    with torch.no_grad():
        state.gates.alpha.copy_(gates)
    state.losses = losses.tolist()
