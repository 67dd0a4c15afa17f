"""Quantized tokens in Triton: the very bits that are defined, in its interpreter and, marked `cuda`, on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from hf_longctx.kernels import dispatch, linear, ops
from hf_longctx.kernels.dispatch import UnsupportedError, use_backend
from hf_longctx.kernels.linear import Tokens

from .test_compiled_linear import assert_bits, assert_same, hard_rows
from .test_triton import DEVICES, need


def dtypes(device: str) -> list[torch.dtype]:
    return [torch.float32, torch.float16, *([torch.bfloat16] if device == "cuda" else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("columns", [32, 72, 5000])
def test_tokens(columns: int, device: str) -> None:
    need(device)
    made = torch.Generator().manual_seed(columns)
    for dtype in dtypes(device):
        x = hard_rows(columns, dtype, made)
        with use_backend("triton"):
            got = linear.quantize_tokens(x.to(device))
        assert dispatch.last_used()["quantize_tokens"] == "triton"
        with use_backend("reference"):
            expected = linear.quantize_tokens(x)
        assert_bits(got, expected)


@pytest.mark.cuda
def test_tokens_by_the_million_are_those_of_the_definition() -> None:
    """Halves, too: a product is rounded before it is rounded to a whole number."""
    need("cuda")
    for dtype in dtypes("cuda"):
        x = torch.randn(1024, 4096, generator=torch.Generator().manual_seed(3)).to(dtype)
        x[::2] = x[::2].mul(8).round().div(8)
        with use_backend("triton"):
            got = linear.quantize_tokens(x.cuda())
        with use_backend("reference"):
            expected = linear.quantize_tokens(x)
        assert_same(Tokens(got.values.cpu(), got.scale.cpu(), got.sums.cpu()), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_out_of_a_norm_and_a_gate(device: str) -> None:
    need(device)
    for dtype in dtypes(device):
        x, up = (torch.randn(5, 96, generator=torch.Generator().manual_seed(s)).to(device, dtype) for s in (0, 1))
        both = torch.cat([x, up], 1)
        with use_backend("reference"):
            normed = ops.rms_norm(x, up[0], 1e-5, 1.0, False)
        with use_backend("triton"):
            got, tokens = linear.quantize_norm(x, up[0], 1e-5, 1.0, False)
            assert torch.equal(got, normed)
            assert_same(tokens, linear.quantize_tokens(normed))
            assert_same(linear.quantize_gated(*both.chunk(2, 1)), linear.quantize_tokens(silu(x) * up))


def test_what_it_does_not_take() -> None:
    need("cpu")
    x = torch.ones(2, 32)

    def refused(reason: str, *rows: Tensor) -> None:
        with use_backend("triton"), pytest.raises(UnsupportedError, match=f"triton: {reason}"):
            linear.quantize_tokens(*rows) if len(rows) == 1 else linear.quantize_gated(*rows)

    refused("takes two axes, none of them empty", x[:0])
    refused("takes two axes", x[None])
    refused("computes no gradients", x.clone().requires_grad_())
    refused("takes at most 65536 channels", torch.ones(1, 1 << 17))
    refused("needs rows in one dtype, float32", x.double())
    refused("has no bfloat16", x.bfloat16())
    refused("needs both on one device, in one dtype and shape", x, x[:1])
