"""What this machine has, and which backend each operation can run on: the first thing to paste into a bug report."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

_PACKAGES = (
    *("hf_longctx", "torch", "transformers", "accelerate", "safetensors", "peft", "triton"),
    *("flash-attn", "flash-attn-3", "gguf"),
)
_ABSENT = "not installed"


@dataclass(frozen=True)
class Device:
    """Something that torch can compute on.

    Attributes:
        name: `cpu` or `cuda:N`.
        model: what it is called.
        capability: `sm_90` for CUDA, the instruction set for the CPU.
        memory_bytes: all of it, in use or not.
    """

    name: str
    model: str
    capability: str
    memory_bytes: int


def versions() -> dict[str, str]:
    """Versions of Python, of what the package stands on, and of the CUDA compiler."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = _ABSENT
    return {**found, "nvcc": _nvcc()}


def _nvcc() -> str:
    """Release of the CUDA compiler on the PATH or under CUDA_HOME."""
    home = os.environ.get("CUDA_HOME")
    there = shutil.which("nvcc") or (shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None)
    if there is None:
        return "not found on the PATH or under CUDA_HOME"
    said = subprocess.run([there, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release ([\d.]+)", said)
    return release.group(1) if release else f"{there} names no release"


def devices() -> list[Device]:
    """The CPU and every CUDA device that torch sees."""
    import psutil
    import torch

    found = [
        Device(
            "cpu",
            f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
            torch.backends.cpu.get_cpu_capability(),
            int(psutil.virtual_memory().total),
        )
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        found.append(Device(f"cuda:{index}", facts.name, f"sm_{facts.major}{facts.minor}", int(facts.total_memory)))
    return found


def collect() -> dict[str, Any]:
    """Everything that `doctor` shows, as plain values that JSON can hold."""
    from .kernels import dispatch
    from .kernels.compiled import library
    from .methods import METHODS

    return {
        "platform": platform.platform(),
        "versions": versions(),
        "devices": [asdict(device) for device in devices()],
        "methods": list(METHODS),
        "library": {"built_for": library.about(), "path": str(library.path())},
        "backend_asked_for": dispatch.wanted(),
        "operations": [
            {"op": row.op, "backend": row.backend, "available": row.available, "reason": row.reason}
            for row in dispatch.table()
        ],
    }


def render(found: dict[str, Any]) -> list[RenderableType]:
    """The tables of a terminal, from what `collect` found."""
    from rich.table import Table

    about = Table(title=found["platform"], title_justify="left")
    about.add_column("package")
    about.add_column("version")
    for package, installed in found["versions"].items():
        about.add_row(package, installed, style="dim" if installed == _ABSENT else None)

    places = Table(title="Devices", title_justify="left")
    for column in ("device", "model", "capability", "memory"):
        places.add_column(column, justify="right" if column == "memory" else "left")
    for device in found["devices"]:
        memory = f"{device['memory_bytes'] / 2**30:.1f} GiB"
        places.add_row(device["name"], device["model"], device["capability"], memory)
    if len(found["devices"]) == 1:
        places.caption = "No CUDA device: every method runs on the CPU. Same results, not fast."

    built = f"Compiled library: {found['library']['built_for'] or 'none'}"
    return [about, places, built, *_operations(found), f"Methods: {', '.join(found['methods'])}"]


def _operations(found: dict[str, Any]) -> list[RenderableType]:
    """A line for each operation, and one for each reason why a backend that has some of them does not run here."""
    from rich.table import Table

    from .kernels.dispatch import LACKS

    asked = found["backend_asked_for"]
    shown = Table(title=f"Operations{f' (only {asked}: HF_LONGCTX_BACKEND)' if asked else ''}", title_justify="left")
    for column in ("operation", "runs on", "could run on"):
        shown.add_column(column)
    able: dict[str, list[str]] = {}
    refused: dict[tuple[str, str], int] = {}
    for row in found["operations"]:
        here = able.setdefault(row["op"], [])
        if row["available"]:
            here.append(row["backend"])
        elif not row["reason"].endswith(LACKS):
            refused[row["backend"], row["reason"]] = refused.get((row["backend"], row["reason"]), 0) + 1
    for op, here in able.items():
        runs = here[0] if asked is None else asked if asked in here else "none"
        shown.add_row(op, runs, ", ".join(backend for backend in here if backend != runs))
    return [
        shown,
        *(f"{by} does not run its {count} operation{'s' * (count > 1)}: {why}" for (by, why), count in refused.items()),
    ]


if __name__ == "__main__":
    from rich.console import Console

    for part in render(collect()):
        Console().print(part)
