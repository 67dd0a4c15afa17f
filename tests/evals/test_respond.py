"""How `generate` is called."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from hf_longctx.evals.respond import Ticks, greedy


class Taking:
    """A model whose `generate` takes keys out of what it is given, as some versions do."""

    generation_config = SimpleNamespace(eos_token_id=[2, 3])

    def generate(self, ids: torch.Tensor, **kwargs: Any) -> tuple[Any, ...]:
        return kwargs["cache_config"].pop("backend"), kwargs["pad_token_id"], kwargs["do_sample"], len(ids)


def test_arguments_are_as_they_were_for_the_next_call() -> None:
    extra = {"cache_config": {"backend": "hqq", "nbits": 4}}
    for _ in range(2):
        assert greedy(Taking(), torch.ones(1, 3, dtype=torch.long), 4, 2, Ticks(), **extra) == ("hqq", 2, False, 1)
    assert extra == {"cache_config": {"backend": "hqq", "nbits": 4}}
