"""Deltas from wherever they are: a folder, the hub, or a file as the authors of the paper publish them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .checkpoint import fetch
from .format import Base, Delta, read
from .message import say


def open_delta(source: Any) -> Delta:
    """A delta that is opened already, a folder, a `.pt` file, or an id on the hub.

    Raises:
        FileNotFoundError: there is no such thing.
        ValueError: it is not a delta, or is damaged.
    """
    if isinstance(source, Delta):
        return source
    path = Path(source).expanduser()
    if path.is_file():
        from .published import read_published

        return read_published(path)
    return read(fetch(str(source))[0])


def base_folder(base: Base, folder: Path) -> tuple[str, str | None]:
    """Where the base of a delta is: a folder beside it, or an id and revision on the hub.

    Args:
        base: what the delta says.
        folder: of the delta.

    Raises:
        ValueError: it does not say.
    """
    if base.name is None:
        raise ValueError(say(str(folder), "the name of its base", "none", "Load the base, then hf_longctx.deltas.load"))
    beside = folder / base.name
    if beside.is_dir():
        return str(beside.resolve()), None
    if base.revision is None and not Path(base.name).is_dir():
        advice = "Put it there, or load the base, then hf_longctx.deltas.load"
        raise FileNotFoundError(say(str(folder), "its base", f"nothing at {base.name}", advice))
    return base.name, base.revision


def convert(source: Path, base: str, out: Path, dense: str = "16", revision: str | None = None) -> None:
    """A published delta in the form of our files, beside its base.

    Args:
        source: `diff.pt`.
        base: folder or hub id; the file does not say which.
        out: folder, made if need be.
        dense: as in `compress.Settings`.
        revision: of the base on the hub.

    Raises:
        ValueError: the file is not a published delta, or is not one of this base; or the folder is not empty.
        FileNotFoundError: there is no such file or base.
    """
    from safetensors.torch import save_file

    from .checkpoint import Checkpoint, Layout
    from .compress import Settings
    from .digest import weight_checksum
    from .format import ONE_FILE, metadata
    from .published import read_published
    from .writing import dense_tensors, write_config

    Settings(dense=dense)
    delta, below = read_published(source), Checkpoint.open(base, revision)
    layout = Layout.of(below.config)
    if out.exists() and any(out.iterdir()):
        raise ValueError(say("delta convert", "an empty folder", out, "Choose another"))
    unknown = {*delta.matrices, *delta.dense} - layout.kinds.keys()
    if unknown:
        advice = "Is it a delta of another base?"
        raise ValueError(say(f"{source}, {sorted(unknown)[0]}", f"names of {base}", "another", advice))
    tensors = Delta("", Base(), delta.matrices, {}).tensors()
    checksums = {}
    for key in below.files:
        name, weight = layout.name(key), below.tensor(key)
        checksums[name] = weight_checksum(weight)
        own = delta.dense.get(name)
        if own is not None and (own.shape != weight.shape or not torch.equal(own.float(), weight.float())):
            tensors |= dense_tensors(name, own, dense)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / ONE_FILE, metadata(tensors, checksums))
    config = json.loads((below.folder / "config.json").read_text(encoding="utf-8"))
    first = delta.dense.get(layout.ends[0])
    size = {} if first is None else {"vocab_size": len(first)}
    write_config(out, {**config, **size}, below, checksums)
