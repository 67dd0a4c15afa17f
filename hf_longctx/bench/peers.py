"""What others have for long contexts, where it is installed; what is not is absent, with one line that says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from packaging.requirements import Requirement
from transformers import cache_utils


@dataclass(frozen=True)
class Peer:
    """A way to run an unpatched model.

    Attributes:
        name: in tables and files, after `hf:` where it is transformers' own.
        generate: arguments for `generate`.
        needs: the package that it needs, or None.
        cuda: it needs CUDA.
        press: a class of kvpress that is in force meanwhile, or None.
        layer: a class of transformers' caches that not every version has, or None.
    """

    name: str
    generate: dict[str, Any] = field(default_factory=dict)
    needs: str | None = None
    cuda: bool = False
    press: str | None = None
    layer: str | None = None

    def missing(self, device: torch.device) -> str | None:
        """Why it is absent, or None."""
        if self.needs and not _installed(self.needs):
            return f"needs {self.needs}, which is not installed"
        if self.needs and (host := _other_host(self.needs)):
            return f"needs {host}, not {transformers.__version__}"
        if self.layer and not hasattr(cache_utils, self.layer):
            return f"needs a later transformers, with {self.layer}"
        return "needs CUDA" if self.cuda and device.type != "cuda" else None

    def running(self, model: Any) -> AbstractContextManager[dict[str, Any]]:
        """The block in which it is in force; gives the arguments for `generate`."""
        return self._running(model)

    @contextmanager
    def _running(self, model: Any) -> Iterator[dict[str, Any]]:
        if self.press is None:
            yield dict(self.generate)
            return
        import kvpress

        with getattr(kvpress, self.press)(compression_ratio=0.5)(model):
            yield dict(self.generate)


def _quantized(backend: str, **more: Any) -> dict[str, Any]:
    return {"cache_implementation": "quantized", "cache_config": {"backend": backend, **more}}


PEERS = {
    peer.name: peer
    for peer in (
        Peer("unpatched"),
        Peer("hf:static", {"cache_implementation": "static"}),
        Peer("hf:offloaded", {"cache_implementation": "offloaded"}, cuda=True),
        Peer("hf:fp8", _quantized("fp8"), layer="Fp8QuantizedLayer"),
        Peer("hf:hqq", _quantized("hqq", nbits=4), needs="hqq"),
        Peer("hf:quanto", _quantized("quanto", nbits=4), needs="optimum.quanto"),
        Peer("kvpress:snapkv", needs="kvpress", press="SnapKVPress"),
    )
}
"""By name. `hf:` is what transformers ships, its quantized caches by their backend; `kvpress:` at half of the keys."""


def choose(wanted: str, device: torch.device) -> tuple[list[Peer], list[str]]:
    """Peers to run, and a line for each that was asked for and is absent.

    Args:
        wanted: names with commas between, `all`, or `none`.
        device: that runs the model.

    Raises:
        ValueError: no such peer.
    """
    named = [name.strip() for name in wanted.split(",") if name.strip()]
    if named in (["none"], ["all"]):
        named = list(PEERS) if named == ["all"] else []
    for name in named:
        if name not in PEERS:
            raise ValueError(f"--peers: expected all, none or some of {', '.join(PEERS)}; got '{name}'. Leave it out.")
    reasons = {name: PEERS[name].missing(device) for name in dict.fromkeys(named)}
    found = [PEERS[name] for name, reason in reasons.items() if reason is None]
    return found, [f"{name} is absent: it {reason}." for name, reason in reasons.items() if reason]


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # the package that it would be in is not there
        return False


def _other_host(package: str) -> str | None:
    """What a package asks of transformers, if this version is not that: it would import, and fail as it runs."""
    try:
        asked = [Requirement(line) for line in requires(package.replace(".", "-")) or ()]
    except PackageNotFoundError:  # found, but not installed by name
        return None
    here = [one for one in asked if one.name == "transformers" and not (one.marker and not one.marker.evaluate())]
    return next((str(one) for one in here if not one.specifier.contains(transformers.__version__, True)), None)
