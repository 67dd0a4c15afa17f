"""Distillation from files to files: the folder of a delta, its fine-tune, and a text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...evals.assets import pick_device
from ...evals.text import read as read_text
from ...evals.text import stream_ids
from .checkpoint import fetch
from .distil import Lessons, distil
from .format import read
from .sources import base_folder
from .writing import update


def run(
    folder: Path,
    finetuned: str,
    text: Path | None,
    lessons: Lessons,
    device: str = "auto",
    dtype: str = "auto",
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Teach the scales of a delta, and write them into its files.

    Args:
        folder: of the delta.
        finetuned: folder or hub id of the fine-tune.
        text: UTF-8; None: the text that ships with the package.
        lessons: how.
        device: as in `evals.assets.load`.
        dtype: `auto` is the fine-tune's own.
        on_step: told each step and its loss.

    Returns:
        The loss of each step.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: as `distil` and `format.read`; the files stay.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    delta, place = read(folder), pick_device(device)
    tuned = str(fetch(finetuned)[0])
    ids = stream_ids(AutoTokenizer.from_pretrained(tuned), read_text(text))
    name, revision = base_folder(delta.base, folder)
    wanted: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
    teacher: Any = AutoModelForCausalLM.from_pretrained(tuned, dtype=wanted)
    base: Any = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=teacher.dtype)
    losses: list[float] = []

    def note(step: int, loss: float) -> None:
        losses.append(loss)
        on_step(step, loss)

    update(folder, distil(base.to(place), teacher.to(place), delta, ids, lessons, note))
    return losses
