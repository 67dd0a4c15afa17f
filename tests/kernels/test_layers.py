"""Norms and rotations: what transformers' own layers give, from the definition and, marked `cuda`, from one launch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb as rotate_pairs
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate_whole
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.olmo2.modeling_olmo2 import apply_rotary_pos_emb as rotate_wide
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as rotate_part

from hf_longctx.kernels import dispatch, ops
from hf_longctx.kernels.compiled import library, norm, rotary

from .built import need

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
devices = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture
def _poisoned() -> Iterator[None]:
    """Memory that nobody has written to holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ran(op: str, device: str, *arguments: Any) -> Any:
    """What an operation gives on a device: on CUDA from the library."""
    if device == "cuda":
        need(device)
    got = getattr(ops, op)(
        *(x.to(device) if isinstance(x, Tensor) and x.device.type != device else x for x in arguments)
    )
    assert dispatch.last_used()[op] == ("compiled" if device == "cuda" else "reference")
    return got


# norms ------------------------------------------------------------------------------------------------------------

FORMS: dict[str, tuple[Callable[..., Any], float, bool]] = {
    "llama": (LlamaRMSNorm, 0.0, True),
    "olmo2": (Olmo2RMSNorm, 0.0, False),
    "gemma": (GemmaRMSNorm, 1.0, False),
}
SHAPES = [(1, 1, 4096), (3, 8, 64), (2, 5, 3, 128), (7, 8), (1, 264), (2, 1, 8192), (1, 2, 8200), (1, 1, 16384)]


def stock(form: str, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What the layer of transformers gives, on the CPU."""
    layer = FORMS[form][0](len(weight), eps=eps)
    layer.weight = torch.nn.Parameter(weight)
    with torch.no_grad():
        out: Tensor = layer(x)
    return out


def assert_close(got: Tensor, expected: Tensor, ulps: int) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    eps = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(got.cpu().double(), expected.double(), rtol=ulps * eps, atol=0)


@devices
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(form: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x, weight = (3 * random(*shape)).to(dtype), random(shape[-1], seed=1).to(dtype)
    x.view(-1, shape[-1])[-1] *= 1e-3  # where eps counts
    got = ran("rms_norm", device, x, weight, 1e-5, *FORMS[form][1:])
    assert got.is_contiguous()
    assert_close(got, stock(form, x, weight, 1e-5), 0 if device == "cpu" else 8 if dtype == torch.float32 else 2)
    assert torch.equal(got, ran("rms_norm", device, x, weight, 1e-5, *FORMS[form][1:]))


@devices
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("dtype", "other"), [(t, torch.float32) for t in DTYPES[:2]] + [(torch.float32, t) for t in DTYPES]
)
def test_norms_whose_weight_has_another_dtype(form: str, dtype: torch.dtype, other: torch.dtype, device: str) -> None:
    x, weight = random(2, 3, 320).to(dtype), random(320, seed=1).to(other)
    got = ran("rms_norm", device, x, weight, 1e-6, *FORMS[form][1:])
    ulps = 8 if got.dtype == torch.float32 and dtype == torch.float32 else 2
    expected = stock(form, x, weight, 1e-6)
    if device == "cuda" and form == "llama" and dtype != torch.float32:  # one more or less before the weight
        assert got.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(got.cpu(), expected, rtol=torch.finfo(dtype).eps, atol=0)
    else:
        assert_close(got, expected, 0 if device == "cpu" else ulps)


@devices
@pytest.mark.parametrize("early", [True, False])
def test_norms_are_the_formula(early: bool, device: str) -> None:
    x, weight = random(4, 1000), random(1000, seed=1)
    root = (x.double().square().sum(-1) / 1000 + 0.25).sqrt()
    expected = torch.stack([x[i].double() / root[i] * (weight.double() + 0.5) for i in range(4)]).float()
    torch.testing.assert_close(ran("rms_norm", device, x, weight, 0.25, 0.5, early).cpu(), expected, rtol=1e-6, atol=0)


@devices
def test_norms_of_rows_that_lie_apart(device: str) -> None:
    """Heads as projections lay them out, a part of wider rows, and every other token."""
    for shape, laid in (
        ((2, 3, 5, 64), lambda x: x.transpose(1, 2)),
        ((2, 3, 5, 192), lambda x: x[..., 64:128].transpose(0, 2)),
        ((2, 6, 64), lambda x: x[:, ::2]),
        ((3, 64), lambda x: x[:1].expand(4, 64)),
    ):
        x, weight = laid(random(*shape).to(device)), random(64, seed=1).to(device)
        assert not x.is_contiguous()
        got = ran("rms_norm", device, x, weight, 1e-6, 0.0, True)
        assert torch.equal(got, ran("rms_norm", device, x.contiguous(), weight, 1e-6, 0.0, True))


OWN = [(4, 1, 4096), (5, 3, 64), (4, 5, 3, 128), (6, 8), (3, 1, 8200)]


@devices
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", OWN, ids=str)
@pytest.mark.parametrize(("dtype", "other"), [*((t, t) for t in DTYPES), (torch.bfloat16, torch.float32)])
def test_norms_of_rows_with_weights_of_their_own(
    form: str, shape: tuple[int, ...], dtype: torch.dtype, other: torch.dtype, device: str
) -> None:
    """Each row is to the bit what it is alone."""
    x, weights = (3 * random(*shape)).to(dtype), random(3, 2, shape[-1], seed=1).to(other)[:, 1]
    of_row, knobs = torch.tensor([2, 0, 1, 1, 2, 2])[: len(x)], (1e-5, *FORMS[form][1:])
    if x.ndim == 4:
        x = x.transpose(1, 2)  # heads as projections lay them out
    got = ran("rms_norm", device, x, weights, *knobs, of_row)
    for row, own in enumerate(of_row.tolist()):
        alone = ran("rms_norm", device, x[row : row + 1], weights[own], *knobs)
        assert got.dtype == alone.dtype
        assert torch.equal(got[row : row + 1], alone)


@pytest.mark.cuda
def test_weights_that_there_are_not_are_not_read() -> None:
    x, weights = on_cuda(4, 64), on_cuda(3, 64)
    found, wanted = (
        ran("rms_norm", "cuda", x, weights[:2], 1e-5, 0.0, True, torch.tensor(of_row))
        for of_row in ([0, 2, -1, 1 << 40], [0, 0, 0, 0])
    )
    assert torch.equal(found[0], wanted[0])
    assert not found[1:].any()


@devices
def test_norms_of_what_is_no_number(device: str) -> None:
    x = random(4, 64)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    got = ran("rms_norm", device, x, torch.ones(64), 1e-6, 0.0, True).cpu()
    assert got[1].isnan().all()
    assert got[2, 5].isnan()
    assert (got[2, :5] == 0).all()
    assert got[[0, 3]].isfinite().all()


# gates ------------------------------------------------------------------------------------------------------------


@devices
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("shape", [(8,), (3, 40), (1, 70, 2048), (2, 3, 14336)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_gates(dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    """To the bit what torch gives there, large and small numbers and such that are none included."""
    gate, up = ((4 * random(*shape, seed=i)).to(dtype).to(device) for i in range(2))
    odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e4, -1e4, -3e-6], dtype=dtype)
    gate.view(-1)[:8] = odd.to(device)
    got = ran("gated", device, gate, up)
    expected = torch.nn.functional.silu(gate) * up
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@devices
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_gates_of_every_number(dtype: torch.dtype, device: str) -> None:
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
    got = ran("gated", device, gate, torch.ones_like(gate))
    torch.testing.assert_close(got, torch.nn.functional.silu(gate), rtol=0, atol=0, equal_nan=True)


def test_gates_that_the_library_leaves_to_others() -> None:
    half = torch.zeros(4, 8, dtype=torch.bfloat16)
    for gate, up in ((half, half), (half.float(), half.float()), (half[:, :4], half[:, 4:]), (half, half.half())):
        assert norm.reject_gated(gate, up) is not None
    need("cpu")
    assert "CUDA" in str(norm.reject_gated(half, half))


# rotations --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Sizes of a rotation: rows, query heads, KV heads, tokens, channels, channels that turn."""

    rotate: Callable[..., Any]
    sizes: tuple[int, int, int, int, int, int] = (2, 8, 2, 3, 64, 64)
    shared: bool = False  # one row of angles for all
    wide: bool = False  # angles in float32

    def __str__(self) -> str:
        words = [self.rotate.__module__.split(".")[-2], *map(str, self.sizes)]
        return "-".join(words + ["shared"] * self.shared + ["wide"] * self.wide)


CASES = [
    *(
        Case(rotate_whole, (b, h, g, t, d, d))
        for b, h, g, t in ((1, 32, 8, 1), (3, 5, 1, 8))
        for d in (8, 24, 128, 256)
    ),
    Case(rotate_whole, (4, 4, 4, 2, 80, 80), shared=True),
    *(Case(rotate_part, (2, 6, 3, 2, d, r)) for d, r in ((96, 72), (64, 8), (128, 32), (40, 40))),
    *(Case(rotate_pairs, (2, 8, 2, t, d, d), shared=True) for t, d in ((1, 64), (3, 128))),
    *(Case(rotate_wide, (2, 8, 2, t, d, d), wide=True) for t, d in ((1, 128), (5, 16))),
]


def heads(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Queries and keys as projections lay them out, angles, and how many channels turn."""
    rows, q_heads, kv_heads, tokens, dim, size = case.sizes
    both = random(rows, tokens, (q_heads + kv_heads) * dim).to(device, dtype)
    q, k = both.split([q_heads * dim, kv_heads * dim], -1)
    width = size // 2 if case.rotate is rotate_pairs else size
    angles = random(2, 1 if case.shared else rows, tokens, width, seed=1).to(
        device, torch.float32 if case.wide else dtype
    )
    q, k = (x.view(rows, tokens, -1, dim).transpose(1, 2) for x in (q, k))
    return q, k, angles[0], angles[1], size


@devices
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotations(case: Case, dtype: torch.dtype, device: str) -> None:
    expected = case.rotate(*heads(case, dtype)[:4])
    for _ in range(2):
        for mine, theirs in zip(ran("rotate_heads", device, *heads(case, dtype, device)), expected, strict=True):
            assert mine.dtype == dtype
            assert torch.equal(mine.cpu(), theirs)


@devices
def test_rotations_of_parts_of_heads(device: str) -> None:
    """Slices of channels, angles as transposed views of others, and keys that lie as attention wants them."""
    q, k, cos, sin, _ = heads(CASES[2], torch.bfloat16, device)
    sliced, turned = q[..., 4:100], cos.transpose(0, 1).contiguous().transpose(0, 1)
    got = ran("rotate_heads", device, sliced, k[..., :96].contiguous(), turned[..., :96], sin[..., 32:], 96)
    expected = rotate_whole(sliced.cpu(), k[..., :96].cpu(), cos[..., :96].cpu(), sin[..., 32:].cpu())
    assert all(torch.equal(mine.cpu(), theirs) for mine, theirs in zip(got, expected, strict=True))


@devices
def test_rotations_are_the_formula(device: str) -> None:
    q, k, cos, sin, size = heads(Case(rotate_part, (1, 2, 1, 2, 24, 16)), torch.float32)
    expected = q.clone()
    for h in range(2):
        for t in range(2):
            for i in range(8):
                a, b = (float(q[0, h, t, j]) for j in (i, i + 8))
                expected[0, h, t, i] = a * float(cos[0, t, i]) - b * float(sin[0, t, i])
                expected[0, h, t, i + 8] = b * float(cos[0, t, i + 8]) + a * float(sin[0, t, i + 8])
    torch.testing.assert_close(ran("rotate_heads", device, q, k, cos, sin, size)[0].cpu(), expected)


# the library ------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_captured_calls_follow_their_input() -> None:
    need("cuda")
    q, k, cos, sin, size = heads(CASES[0], torch.bfloat16, "cuda")
    weight = random(q.shape[3]).bfloat16().cuda()

    def run() -> tuple[Tensor, ...]:
        return (*rotary.rotate_heads(q, k, cos, sin, size), norm.rms_norm(q, weight, 1e-6, 0.0, True))

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        for x in (q, k, cos, sin, weight):
            x.mul_(-1.25)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))


def test_on_a_cpu_they_are_left_to_torch() -> None:
    need("cpu")
    x = random(2, 64)
    assert norm.reject(x, x[0], 1e-6, 0.0, True) == "is for CUDA: there it is one launch in place of many"
    assert "is for CUDA" in str(rotary.reject(*heads(CASES[0], torch.float32)))


def on_cuda(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return random(*shape).to("cuda", dtype)


@pytest.mark.cuda
def test_norms_that_it_does_not_take() -> None:
    need("cuda")
    x, weight = on_cuda(2, 64), on_cuda(64)
    for rows, scale, reason in (
        (x[:, :60], weight[:60], "takes a multiple of 8 channels"),
        (on_cuda(1, 16392), on_cuda(16392), "at most 16384"),
        (x[:0], weight, "none of them empty"),
        (x.view(1, 1, 1, 2, 64), weight, "takes 1 to 4 axes"),
        (x.half(), weight, "needs rows and weight in one dtype"),
        (x.double(), weight.double(), "needs rows and weight in one dtype"),
        (x[:, 4:60], weight[:56], "rows that begin at multiples of 16 bytes"),
        (x.t(), on_cuda(2), "multiple of 8"),
        (x, weight.cpu(), "on one device"),
        (x.clone().requires_grad_(), weight, "computes no gradients"),
    ):
        assert reason in str(norm.reject(rows, scale, 1e-6, 0.0, True))
    of_row = torch.zeros(2, dtype=torch.int64, device="cuda")
    for scale, own, reason in (
        (weight, of_row, "needs weights [W, D]"),
        (x, of_row[:1], "one number for each row"),
        (x, of_row.int(), "needs the numbers of weights as int64"),
        (x, of_row.cpu(), "on the device of x"),
    ):
        assert reason in str(norm.reject(x, scale, 1e-6, 0.0, True, own))


@pytest.mark.cuda
def test_rotations_that_it_does_not_take() -> None:
    need("cuda")
    q, k, cos = on_cuda(2, 4, 3, 64), on_cuda(2, 2, 3, 64), on_cuda(2, 3, 64)
    for heads_, keys, angle, size, reason in (
        (q, k, cos[..., :20], 20, "takes multiples of 8 channels"),
        (q[..., :60], k[..., :60], cos[..., :56], 56, "takes multiples of 8 channels"),
        (q[:, :0], k, cos, 64, "takes no empty queries"),
        (q, k.half(), cos, 64, "needs queries and keys in one dtype"),
        (q, k, cos.half(), 64, "needs cos and sin in the dtype of the queries"),
        (q[..., 2:58], k[..., 2:58], cos[..., :56], 56, "multiples of 4 elements"),
        (q, k, cos.cpu(), 64, "on one device"),
    ):
        assert reason in str(rotary.reject(heads_, keys, angle, angle, size))


BLOCK = {"outer": 1, "middle": 1, "inner": 1, "dim": 64}
TURN = {"batch": 1, "q_heads": 2, "kv_heads": 1, "tokens": 1, "dim": 64, "size": 64}
REFUSED: list[tuple[str, type[ctypes.Structure], dict[str, int], str]] = [
    ("norm", norm.HflNorm, {**BLOCK, "dtype": 7}, "expected float32, float16 or bfloat16"),
    ("norm", norm.HflNorm, {**BLOCK, "dtype": 1, "weight_dtype": 2}, "one of the dtypes to be float32"),
    ("norm", norm.HflNorm, {**BLOCK, "dim": 60}, "expected a multiple of 8 channels"),
    ("norm", norm.HflNorm, {**BLOCK, "middle": 0}, "expected no empty axis"),
    ("norm", norm.HflNorm, {**BLOCK, "outer": 1 << 20, "inner": 1 << 12}, "expected fewer than 2^31 rows"),
    ("norm", norm.HflNorm, {**BLOCK, "out": 8}, "expected tensors that begin at multiples of 16 bytes"),
    ("norm", norm.HflNorm, {**BLOCK, "x_i": 2}, "expected rows that begin at multiples of 16 bytes"),
    ("norm", norm.HflNorm, {**BLOCK, "weight_r": 2}, "expected weights that begin at multiples of 16 bytes"),
    ("norm", norm.HflNorm, {**BLOCK, "of_row": 8}, "expected as many rows for each number of weights"),
    ("norm", norm.HflNorm, {**BLOCK, "of_row": 8, "each": 2}, "expected as many rows for each number of weights"),
    ("turn", rotary.HflTurn, {**TURN, "dtype": 3}, "expected float32, float16 or bfloat16"),
    ("turn", rotary.HflTurn, {**TURN, "dtype": 1, "angle_dtype": 2}, "the dtype of the queries, or in float32"),
    ("turn", rotary.HflTurn, {**TURN, "size": 72}, "no more that are turned than there are"),
    ("turn", rotary.HflTurn, {**TURN, "q_heads": 0}, "expected no empty axis but that of KV heads"),
    ("turn", rotary.HflTurn, {**TURN, "kv_heads": -1}, "expected no empty axis but that of KV heads"),
    ("turn", rotary.HflTurn, {**TURN, "batch": 1 << 24}, "expected fewer than 2^31 channels"),
    ("turn", rotary.HflTurn, {**TURN, "k_out": 4}, "expected rows that begin at every fourth element"),
    ("turn", rotary.HflTurn, {**TURN, "angle_t": 6}, "expected rows that begin at every fourth element"),
    ("turn", rotary.HflTurn, {**TURN, "sin": 8}, "expected angles that begin at every fourth element"),
]


@pytest.mark.parametrize(("op", "struct", "fields", "words"), REFUSED)
def test_the_library_looks_before_it_launches(
    op: str, struct: type[ctypes.Structure], fields: dict[str, int], words: str
) -> None:
    need("cpu")
    if not library.about().startswith("CUDA"):
        pytest.skip("the library was built without CUDA")
    with pytest.raises(RuntimeError, match=f"hfl_{op}_cuda: .*{words.replace('^', '.')}"):
        library.call(f"hfl_{op}_cuda", struct(**fields))
