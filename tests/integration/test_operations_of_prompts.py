"""How many operations a layer has for a prompt: on a GPU each is a launch, and a short prompt waits for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import hf_longctx as lc

from ..kernels.built import need

TOKENS = 300
"""Of the prompt: of InfLLM one block of queries."""

FREE = frozenset(
    {
        *("alias", "as_strided", "detach", "expand", "lift_fresh", "permute", "select", "slice", "split"),
        *("split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view", "_unsafe_view"),
        *("_reshape_alias", "empty", "empty_like", "empty_strided", "new_empty"),
    }
)
"""Operations that compute nothing."""


class Counted(TorchDispatchMode):
    """Counts the others."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += function.name().partition("::")[2].partition(".")[0] not in FREE
        return function(*args, **(kwargs or {}))


def count(layers: int, method: Any, kv: str | None) -> int:
    """Of a prompt and its first token."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=layers, head_dim=16, max_position_embeddings=4096, **sizes)
    model = LlamaForCausalLM(config).eval()
    if method is not None:
        lc.patch(model, method(layers), **({} if kv is None else {"kv": kv}))
    ids = torch.randint(0, 64, (1, TOKENS))
    with Counted() as counted:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
    return counted.number


def gates(layers: int) -> list[list[float]]:
    return [[1.0, 0.0, 1.0, 0.0]] * layers


METHODS: dict[str, tuple[Any, int]] = {
    "dense": (lambda layers: lc.Dense(), 0),
    "quest": (lambda layers: lc.Quest(dense_layers=0), 0),
    "xattention": (lambda layers: lc.XAttention(), 0),
    "lserve": (lambda layers: lc.LServe(pattern=gates(layers)), 0),
    "streaming_llm": (lambda layers: lc.StreamingLLM(window=1024), 0),
    "duo_attention": (lambda layers: lc.DuoAttention(pattern=gates(layers), sparsity=0.5, window=1024), 0),
    "inf_llm": (lambda layers: lc.InfLLM(), 2),
}
"""Each method where it reads all of a prompt, and how many operations a layer it may have beyond the model's own."""


@pytest.fixture(scope="module")
def stock() -> int:
    return count(2, None, None) - count(1, None, None)


@pytest.mark.parametrize("kv", [None, "int8", "int4"])
@pytest.mark.parametrize("name", METHODS)
def test_operations_of_a_layer(name: str, kv: str | None, stock: int) -> None:
    need("cpu")  # without the library there are more
    method, beyond = METHODS[name]
    count(1, method, kv)  # makes what is made once
    assert count(2, method, kv) - count(1, method, kv) <= stock + beyond
