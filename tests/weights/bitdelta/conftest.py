from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hf_longctx as lc

from . import pairs


class Pair:
    """A base, a fine-tune, and its delta, in folders."""

    def __init__(self, root: Path, family: str, tuned: Any, base: Any, **settings: Any) -> None:
        self.base, self.tuned, self.family = base, tuned, family
        self.base_folder = root / "base"
        if not self.base_folder.exists():
            pairs.save(base, self.base_folder)
        self.folder = root / f"delta-{len(list(root.iterdir()))}"
        tuned_folder = pairs.save(tuned, root / f"tuned-{self.folder.name}")
        self.tuned_folder = tuned_folder
        self.sizes = lc.deltas.compress(self.base_folder, tuned_folder, self.folder, **{"dense": "native", **settings})

    def stands_for(self) -> Any:
        return pairs.stands_for(self.base, self.tuned)


def llamas(root: Path, **facts: Any) -> dict[str, Pair]:
    """Fine-tunes of one Llama: of all weights, with more tokens, of attention alone, of all weights in two bits."""
    base = pairs.make("llama", **facts)
    return {
        "law": Pair(root, "llama", pairs.tune(base, 1), base),
        "code": Pair(root, "llama", pairs.tune(base, 2, vocabulary=70), base),
        "maths": Pair(root, "llama", pairs.tune(base, 3, but=("mlp", "embed", "norm", "lm_head")), base),
        "poems": Pair(root, "llama", pairs.tune(base, 4), base, bits=2, scales="row"),
    }


@pytest.fixture(scope="session")
def llama_pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Of sizes that are none of the library's for CUDA."""
    return llamas(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def wide_pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Of sizes that the library takes on CUDA."""
    return llamas(tmp_path_factory.mktemp("wide"), hidden_size=128, intermediate_size=256)


@pytest.fixture(scope="session")
def eighth_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """One more of `wide_pairs`, with embeddings in int8."""
    base = pairs.make("llama", hidden_size=128, intermediate_size=256)
    return Pair(tmp_path_factory.mktemp("eighth"), "llama", pairs.tune(base, 5, vocabulary=70), base, dense="int8")


@pytest.fixture
def make_pair(tmp_path: Path) -> Callable[..., Pair]:
    def made(family: str = "llama", seed: int = 1, facts: dict[str, Any] | None = None, **settings: Any) -> Pair:
        base = pairs.make(family, **(facts or {}))
        vocabulary, but = settings.pop("vocabulary", None), settings.pop("but", ())
        return Pair(tmp_path, family, pairs.tune(base, seed, vocabulary, but), base, **settings)

    return made
