"""Fine-tunes of one base beside each other, as bits: load them, make them, see what they take. `hf_longctx.deltas`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedModel

from .models import decoder_of
from .weights.bitdelta.attach import install, remove, state_of
from .weights.bitdelta.bits import Grain
from .weights.bitdelta.compress import Settings
from .weights.bitdelta.compress import run as _run
from .weights.bitdelta.distil import Lessons
from .weights.bitdelta.format import Delta
from .weights.bitdelta.lora import Exported
from .weights.bitdelta.lora import export as _export
from .weights.bitdelta.message import say
from .weights.bitdelta.sources import convert as _convert
from .weights.bitdelta.sources import open_delta
from .weights.bitdelta.teach import run as _teach
from .weights.bitdelta.writing import Sizes

__all__ = [
    "Delta",
    "Exported",
    "Lessons",
    "Report",
    "Sizes",
    "compress",
    "convert",
    "distil",
    "export_lora",
    "load",
    "report",
    "unload",
]

M = TypeVar("M", bound=PreTrainedModel)


@dataclass(frozen=True)
class Report:
    """The tenants of a model, in bytes.

    Attributes:
        tenants: bytes of each in host memory; on the device it takes as many.
        resident: those that are on the device, the least recently used first.
        slots: tenants that fit on the device at a time.
        device_bytes: that all slots take, filled or not.
        base_bytes: of the weights of the base.
    """

    tenants: dict[str, int]
    resident: tuple[str, ...]
    slots: int
    device_bytes: int
    base_bytes: int

    def __str__(self) -> str:
        lines = [
            f"{name}: {size / 2**20:.1f} MiB{', on the device' if name in self.resident else ''}"
            for name, size in self.tenants.items()
        ]
        held = f"{self.slots} slots: {self.device_bytes / 2**20:.1f} MiB; base: {self.base_bytes / 2**20:.1f} MiB"
        return "\n".join([*lines, held])


def load(model: M, deltas: Mapping[str, str | Path | Delta], slots: int | None = None) -> M:
    """Make a loaded base serve many fine-tunes: each row of a batch by the one of its name.

    `model.generate(..., adapter_names=["law", "code", "__base__"])` and `model(..., adapter_names=...)` take a name for
    each row; without, rows are those of `model.set_delta(name)`, at first the base's. `model.add_delta`,
    `delete_delta`, `merge_delta` and `deltas` do what they say.

    Args:
        model: the base, in 16 or 32 bits or quantized; it is changed in place.
        deltas: folders, hub ids, published `.pt` files or opened deltas, by name.
        slots: tenants that are on the device at a time; the others wait in host memory. None: as many as are given.

    Returns:
        The same object.

    Raises:
        FileNotFoundError: a delta is not there.
        ValueError: one is damaged, or is not one of this base; the model is as it was.
        UnsupportedError: one differs in what cannot differ between rows; the model is as it was.
    """
    if hasattr(model, "get_base_model"):
        raise TypeError(say("deltas.load", "a transformers model", "one inside PEFT", "Load deltas first, or merge it"))
    decoder_of(model)
    opened = {name: open_delta(source) for name, source in deltas.items()}
    install(model, opened, max(1, len(opened)) if slots is None else slots)
    return model


def unload(model: M) -> M:
    """Take all tenants off: the model computes bit for bit what the base does. Raises ValueError if it has none."""
    remove(model)
    return model


def report(model: PreTrainedModel) -> Report:
    """What the tenants of a model take. Raises ValueError if it has none."""
    state = state_of(model)
    return Report(
        {name: delta.nbytes for name, delta in state.tenants.items()},
        tuple(state.resident),
        state.slots,
        state.device_bytes,
        sum(x.nbytes for x in model.parameters()),
    )


def compress(
    base: str | Path,
    finetuned: str | Path,
    out: str | Path,
    bits: int = 1,
    scales: str = "matrix",
    dense: str = "16",
    revision: str | None = None,
) -> Sizes:
    """Write the delta of a fine-tune, tensor by tensor; what a former run has begun is finished.

    Args:
        base: folder or hub id.
        finetuned: likewise.
        out: folder.
        bits: of each weight, 1 to 4.
        scales: what shares one: `matrix`, `row`, or a number of inputs of a row.
        dense: how embeddings, head, norms and biases are kept: `16` bits, `int8` (tables), or `native`.
        revision: of the base on the hub.

    Returns:
        What it takes.

    Raises:
        FileNotFoundError: no safetensors files.
        ValueError: a setting, or the two are no pair, or the folder holds something else.
    """
    return _run(str(base), str(finetuned), Path(out), Settings(bits, Grain.of(scales), dense), revision)


def convert(
    source: str | Path, base: str | Path, out: str | Path, dense: str = "16", revision: str | None = None
) -> None:
    """Write a published `diff.pt` as a delta with safetensors and a `config.json`; no code in it is run.

    Args:
        source: the file.
        base: folder or hub id of its base, which the file does not name.
        out: an empty folder, made if need be.
        dense: as in `compress`.
        revision: of the base on the hub.

    Raises:
        FileNotFoundError: there is no such file or base.
        ValueError: it is not a published delta of this base, or the folder is not empty.
    """
    _convert(Path(source), str(base), Path(out), dense, revision)


def distil(
    delta: str | Path,
    finetuned: str | Path,
    text: str | Path | None = None,
    lessons: Lessons | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> list[float]:
    """Teach the scales of a delta what its fine-tune says of a text, and write them into its files.

    Args:
        delta: folder.
        finetuned: folder or hub id.
        text: UTF-8 file; None: the text that ships with the package.
        lessons: how; None: 200 steps of 4 pieces of 128 tokens, as in the paper.
        device: `auto`, `cpu`, `cuda` or `cuda:N`; base and fine-tune are both there.
        dtype: `auto` is the fine-tune's own.

    Returns:
        The loss of each step.

    Raises:
        FileNotFoundError: something is not there.
        ValueError: the text is too short, a setting, or a damaged delta; the files stay.
        RuntimeError: a loss is not finite; the files stay.
    """
    where = None if text is None else Path(text)
    return _teach(Path(delta), str(finetuned), where, lessons or Lessons(), device, dtype)


def export_lora(delta: str | Path | Delta, rank: int, out: str | Path) -> Exported:
    """Write the nearest adapter of a rank, in PEFT's form, and say what it loses.

    Args:
        delta: as in `load`.
        rank: of each matrix.
        out: folder, made if need be.

    Raises:
        ValueError: a rank below 1, or a delta without matrices.
        UnsupportedError: it has matrices of experts.
    """
    return _export(open_delta(delta), rank, Path(out))
