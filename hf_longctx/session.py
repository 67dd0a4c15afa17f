"""A cache in one file, to be read again in another process."""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from .cache.cache import LongContextCache
from .cache.session import put_together, take_apart
from .hooks import Patch
from .models import attention_modules
from .patch import state_of
from .plan import Plan

_KEY = "hf_longctx.session"
_FORMAT = 1


def save_session(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    cache: LongContextCache | None = None,
    notes: dict[str, Any] | None = None,
) -> None:
    """Write a cache to one safetensors file. What was there before stays until the new file is complete.

    Args:
        model: the patched model that filled the cache.
        path: of the file; its folder must be there.
        cache: of this model; None: the one that it used last.
        notes: of yours, as JSON can hold them; `read_notes` gives them back.

    Raises:
        ValueError: the model is not patched, or there is no cache that has seen tokens, of the plan in force.
        RuntimeError: the cache's last call was interrupted.
    """
    state = _state(model, "save_session")
    cache = cache if cache is not None or state.cache is None else state.cache()
    if cache is None or not cache.ledger.columns or cache.plan != state.plan:
        got = "none" if cache is None else f"one of plan '{cache.plan.method}' with {cache.ledger.columns} tokens"
        raise ValueError(
            f"save_session: expected a cache of plan '{state.plan.method}' that has seen tokens; got {got}. "
            "Keep outputs.past_key_values of a call, and pass it as cache."
        )
    if cache.ledger.begun:
        raise RuntimeError(
            "save_session: expected a cache whose calls all ran to their end; got one that was interrupted. "
            "Call cache.reset() and feed the text again."
        )
    tensors, values = take_apart(cache)
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    about = json.dumps(
        {
            "format": _FORMAT,
            "model": _fingerprint(state),
            "plan": state.plan.to_json(),
            "values": values,
            "notes": notes or {},
            "sums": {name: _sum(x) for name, x in tensors.items()},
        }
    )
    _write(tensors, {_KEY: about, f"{_KEY}.sum": str(zlib.crc32(about.encode()))}, Path(path))


def load_session(model: PreTrainedModel, path: str | os.PathLike[str]) -> LongContextCache:
    """Read a cache that `save_session` wrote, to be passed as `past_key_values`.

    To go on from it gives bit for bit what going on from the saved cache would. Models are told apart by their
    configuration and type: weights are not compared.

    Args:
        model: a model like the one that filled the cache, patched with the same plan.
        path: of the file.

    Raises:
        ValueError: the model is not patched, or the file is of another model or plan, damaged or no session at all;
            says which. Nothing was changed.
        FileNotFoundError: there is no such file.
    """
    state = _state(model, "load_session")
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            about = _about(file.metadata() or {}, path)
            _check(about, state, path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error
    for name, known in about["sums"].items():
        if name not in tensors or _sum(tensors[name]) != known:
            raise _damaged(path, f"'{name}' is not what was written")
    modules = attention_modules(state.decoder)
    devices = [next(module.parameters()).device for module in modules]
    return put_together(state.plan, tensors, about["values"], devices)


def read_notes(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The notes in a session file; no model is needed.

    Raises:
        ValueError: the file is damaged or no session.
        FileNotFoundError: there is no such file.
    """
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            notes: dict[str, Any] = _about(file.metadata() or {}, path).get("notes", {})
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error
    return notes


def _state(model: PreTrainedModel, where: str) -> Patch:
    state = state_of(model)
    if state is None:
        raise ValueError(
            f"{where}: expected a patched model; got one that is not. Call hf_longctx.patch(model, ...) first."
        )
    return state


def _fingerprint(state: Patch) -> dict[str, str]:
    """What keys and values depend on, but for the weights; as text, to be compared and shown."""
    config = state.facts.config
    layers = [[x.q_heads, x.kv_heads, x.head_dim, x.window] for x in state.facts.layers]
    part = {"heads": f"{state.facts.rank + 1} of {state.facts.ranks} parts"} if state.facts.ranks > 1 else {}
    return {
        **part,
        "family": state.facts.family,
        "layers": json.dumps(layers),
        "dtype": str(state.decoder.dtype),
        "hidden size": str(getattr(config, "hidden_size", None)),
        "vocabulary": str(getattr(config, "vocab_size", None)),
        "rotary": json.dumps(getattr(config, "rope_parameters", None), sort_keys=True, default=str),
    }


def _about(metadata: dict[str, str], path: str | os.PathLike[str]) -> dict[str, Any]:
    """What the file says of itself."""
    text = metadata.get(_KEY)
    if text is None:
        raise ValueError(
            f"load_session: expected a file written by save_session; got '{os.fspath(path)}', which is none. "
            "Pass the path of a session."
        )
    if metadata.get(f"{_KEY}.sum") != str(zlib.crc32(text.encode())):
        raise _damaged(path, "its description is not what was written")
    about: dict[str, Any] = json.loads(text)
    if about["format"] != _FORMAT:
        raise ValueError(
            f"load_session: expected a session of format {_FORMAT}; got {about['format']} in '{os.fspath(path)}'. "
            "Read it with the version of hf_longctx that wrote it."
        )
    return about


def _check(about: dict[str, Any], state: Patch, path: str | os.PathLike[str]) -> None:
    """Refuse a session of another model or plan."""
    own, other = _fingerprint(state), about["model"]
    for name, value in own.items():
        if other.get(name) != value:
            raise ValueError(
                f"load_session: expected a session of this model, with {name} {value}; got {other.get(name)} in "
                f"'{os.fspath(path)}'. Load the model that the session is of."
            )
    if about["plan"] != state.plan.to_json():
        plan = Plan.from_json(about["plan"])
        raise ValueError(
            f"load_session: expected a session of the plan in force, '{state.plan.method}'; got one of "
            f"'{plan.method}' with other heads or knobs in '{os.fspath(path)}'. Patch the model with that plan:\n"
            f"{plan.describe()}"
        )


def _damaged(path: str | os.PathLike[str], why: str) -> ValueError:
    return ValueError(
        f"load_session: expected a whole session file; got '{os.fspath(path)}', which is damaged or cut short ({why}). "
        "Save the session again."
    )


def _sum(x: Tensor) -> int:
    return zlib.crc32(x.reshape(-1).view(torch.uint8).numpy().data)


def _write(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """Write beside the old file, and put the new one in its place once it is on the disk."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(tensors, name, metadata=metadata)
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
