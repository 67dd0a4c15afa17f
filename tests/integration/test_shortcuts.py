"""Short cuts: which norms and rotations have one, that nothing changes, and that nothing stays."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.utils.deprecation import deprecate_kwarg

import hf_longctx as lc
from hf_longctx import projections, shortcut, shortcuts
from hf_longctx.kernels import ops

from ..kernels.built import need
from ..methods.cases import DECODERS, named
from .again import recorders
from .cases import BY_NAME
from .snapshot import differences, snapshot
from .test_generate import NEW, batch, generate, single
from .tiny import Case

LLAMA = BY_NAME["llama"]
STEPS = NEW  # calls of the decoder: the prompt, and all new tokens but the last
LEFT_ALONE = ("falcon", "mpt", "cohere", "glm", "gpt2", "opt")
"""Families that rotate in another way (cohere and glm in pairs of neighbours), in code of ours, or not at all."""

every = pytest.mark.parametrize("case", DECODERS, ids=named)


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short cuts on the CPU, where the definition runs."""
    need("cpu")
    monkeypatch.setattr(shortcut, "DEVICES", {"cpu"})


here = pytest.mark.usefixtures("_here")


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often each operation of a short cut is called inside."""
    calls: Counter[str] = Counter()

    def counting(name: str, run: Any) -> Any:
        def call(*args: Any) -> Any:
            calls[name] += 1
            return run(*args)

        return call

    with pytest.MonkeyPatch.context() as context:
        for name in ("rms_norm", "rotate_heads"):
            context.setattr(ops, name, counting(name, getattr(ops, name)))
        yield calls


def norms_of(model: nn.Module) -> int:
    return sum(type(module).__name__.endswith("RMSNorm") for module in model.modules())


def cuts(model: Any) -> tuple[int, int]:
    report = lc.report(model)
    return report.norms, report.rotations


@here
@every
def test_every_family(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its norms, and all its rotations but those that differ; the same logits to the bit."""
    model = lc.patch(case.make(), "dense")
    norms = norms_of(model.get_decoder())
    turning = 0 if case.name.startswith(LEFT_ALONE) else case.layers - len(case.nope)
    assert cuts(model) == (norms, 0 if not turning else case.layers)
    with counted() as calls:
        got = generate(model, batch(case), output_logits=True)
    assert calls == Counter({k: n for k, n in (("rms_norm", norms * STEPS), ("rotate_heads", turning * STEPS)) if n})
    monkeypatch.setattr(shortcut, "DEVICES", set())
    plain = lc.patch(case.make(), "dense")
    assert cuts(plain) == (0, 0)
    expected = generate(plain, batch(case), output_logits=True)
    assert torch.equal(got.sequences, expected.sequences)
    assert torch.equal(torch.stack(got.logits), torch.stack(expected.logits))


@here
@every
def test_unpatch_leaves_nothing(case: Case) -> None:
    model = case.make()
    generate(model, single(case))
    before = snapshot(model)
    lc.patch(model, "dense")
    generate(lc.patch(model, "dense"), single(case))
    lc.unpatch(model)
    generate(model, single(case))
    assert differences(before, snapshot(model)) == []


@here
def test_other_dtypes_after_patching() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model, plain = lc.patch(LLAMA.make(), "dense").to(dtype), LLAMA.make().to(dtype)
        with counted() as calls:
            got = generate(model, single(LLAMA), output_logits=True)
        assert calls["rms_norm"] == 5 * STEPS
        with pytest.MonkeyPatch.context() as context:
            context.setattr(shortcut, "DEVICES", set())
            expected = generate(lc.patch(plain, "dense"), single(LLAMA), output_logits=True)
        assert torch.equal(torch.stack(got.logits), torch.stack(expected.logits))


@here
@pytest.mark.parametrize("case", [BY_NAME[n] for n in ("llama", "qwen3", "gemma3", "gpt_oss", "phi3")], ids=named)
def test_recorded_steps(case: Case) -> None:
    model = lc.patch(case.make(), "streaming_llm", sinks=2, window=9)
    with recorders() as again:
        recorded = generate(model, batch(case), output_logits=True)
    assert again.replayed > 5
    lc.patch(model, "streaming_llm", sinks=2, window=9, cuda_graph=False)
    assert cuts(model) > (0, 0)
    plain = generate(model, batch(case), output_logits=True)
    assert torch.equal(recorded.sequences, plain.sequences)


@here
@pytest.mark.parametrize("tokens", [1, 8, 9])
def test_calls_of_any_number_of_tokens(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token's gates are left to the product with their layers; those of more tokens are one launch."""
    model, gates = lc.patch(LLAMA.make(), "dense").to(torch.bfloat16), []
    with torch.no_grad():
        cache = model(LLAMA.prompt(20)).past_key_values
        monkeypatch.setattr(projections, "gated", lambda *args: gates.append(args) or ops.gated(*args))
        with counted() as calls:
            model(LLAMA.prompt(tokens), past_key_values=cache)
    assert calls == Counter(rms_norm=5, rotate_heads=2)
    assert len(gates) == (0 if tokens == 1 else 2)


@here
def test_what_is_not_a_call_of_the_patched_model() -> None:
    model = lc.patch(LLAMA.make(), "dense")
    with counted() as calls, torch.no_grad():
        model.model.norm(torch.randn(1, 1, 64))
    assert not calls


@here
def test_gradients_training_and_autocast() -> None:
    model = lc.patch(LLAMA.make(), "dense")
    ids = LLAMA.prompt(4)
    with counted() as calls:
        model(ids).logits.sum().backward()
        model.train()
        with torch.no_grad():
            model(ids)
        model.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(ids)
    assert not calls
    assert model.model.norm.weight.grad is not None
    other = LLAMA.make()
    other(ids).logits.sum().backward()
    torch.testing.assert_close(model.model.norm.weight.grad, other.model.norm.weight.grad)


@here
def test_compiled_code_is_the_models_own() -> None:
    model = lc.patch(LLAMA.make(), "dense")
    x = torch.randn(1, 1, 64)
    with torch.no_grad(), counted() as calls:
        got = torch.compile(model.model.norm, backend="eager", fullgraph=True)(x)
        assert torch.equal(got, LlamaRMSNorm.forward(model.model.norm, x))
    assert not calls


# copies, files and other packages ---------------------------------------------------------------------------------


@here
@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_of_their_own(way: Any) -> None:
    model = lc.patch(LLAMA.make(), "dense")
    expected = generate(model, single(LLAMA), output_logits=True)
    other = way(model)
    assert cuts(other) == (5, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with counted() as calls:
        got = generate(other, single(LLAMA), output_logits=True)
    assert calls == {"rms_norm": 5 * STEPS, "rotate_heads": 2 * STEPS}
    assert torch.equal(torch.stack(got.logits), torch.stack(expected.logits))
    lc.unpatch(other)
    assert cuts(model) == (5, 2)
    assert not any("forward" in vars(module) for module in other.modules())


@here
def test_a_saved_model_knows_nothing_of_them(tmp_path: Path) -> None:
    case = BY_NAME["qwen3"]
    case.make().save_pretrained(tmp_path / "stock")
    model = lc.patch(case.make(), "dense")
    assert cuts(model) == (9, 2)
    model.save_pretrained(tmp_path / "patched")
    for file in sorted((tmp_path / "stock").iterdir()):
        assert file.read_bytes() == (tmp_path / "patched" / file.name).read_bytes()


@here
@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], "all-linear"])
def test_peft(targets: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=targets, modules_to_save=["model.norm"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(LLAMA.make(), config).eval()
    before = snapshot(model)
    with pytest.MonkeyPatch.context() as context:
        context.setattr(shortcut, "DEVICES", set())
        expected = generate(lc.patch(model, "dense"), single(LLAMA), output_logits=True)
    lc.patch(model, "dense")
    assert cuts(model) == (6, 2)  # the last norm and its copy that is trained
    with counted() as calls:
        got = generate(model, single(LLAMA), output_logits=True)
    assert calls == {"rms_norm": 5 * STEPS, "rotate_heads": 2 * STEPS}
    assert torch.equal(torch.stack(got.logits), torch.stack(expected.logits))
    assert differences(before, snapshot(lc.unpatch(model))) == []


@here
def test_norms_wrapped_after_patching() -> None:
    peft = pytest.importorskip("peft")
    model = lc.patch(LLAMA.make(), "dense")
    expected = generate(model, single(LLAMA), output_logits=True)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["model.norm"])
    ).eval()
    got = generate(wrapped, single(LLAMA), output_logits=True)
    assert torch.equal(torch.stack(got.logits), torch.stack(expected.logits))
    lc.unpatch(wrapped)
    assert not any("forward" in vars(module) for module in wrapped.modules())


@here
def test_hooks_of_accelerate() -> None:
    """Modules that have one are left alone; one that comes later is left in place."""
    model = LLAMA.make()
    first, last = model.model.layers[0], model.model.norm
    for module in (first.self_attn, first.input_layernorm):
        add_hook_to_module(module, ModelHook())
    before = snapshot(model)
    assert cuts(lc.patch(model, "dense")) == (4, 1)
    add_hook_to_module(last, ModelHook())
    assert cuts(model) == (4, 1)
    with counted() as calls:
        got = generate(model, single(LLAMA))
    assert calls == {"rms_norm": 4 * STEPS, "rotate_heads": STEPS}
    lc.unpatch(model)
    assert torch.equal(generate(model, single(LLAMA)).sequences, got.sequences)
    remove_hook_from_module(last)
    assert vars(last).pop("forward") == last.forward  # accelerate leaves the class's own behind
    assert differences(before, snapshot(model)) == []


# proofs -----------------------------------------------------------------------------------------------------------


class OutsideRMSNorm(LlamaRMSNorm):
    """eps stands outside the root."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (
            x.float() / (x.float().square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)
        ).to(x.dtype)


class HalfRMSNorm(LlamaRMSNorm):
    """In bfloat16 the mean is of rounded squares."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x.float() * torch.rsqrt(x.pow(2).float().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class FussyRMSNorm(LlamaRMSNorm):
    """Fails on what it was not made for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] != 1:
            raise RuntimeError("expected one row")
        return super().forward(x)


class CallingRMSNorm(LlamaRMSNorm):
    """Takes more than a tensor."""

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return super().forward(x) * scale


class InheritedRMSNorm(LlamaRMSNorm):
    """The same under another name."""


@here
@pytest.mark.parametrize(
    ("kind", "norms"),
    [
        (InheritedRMSNorm, 5),
        (OutsideRMSNorm, 4),
        (HalfRMSNorm, 4),
        (FussyRMSNorm, 4),
        (CallingRMSNorm, 4),
        (nn.RMSNorm, 4),
    ],
)
def test_norms_that_are_something_else(kind: Any, norms: int) -> None:
    model = LLAMA.make()
    model.model.norm = kind(64, eps=1e-6)
    assert cuts(lc.patch(model, "dense")) == (norms, 2)


def lazily(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    """Rounds once where Llama rounds three times."""
    turned = (
        (
            x.float() * cos.unsqueeze(unsqueeze_dim)
            + modeling_llama.rotate_half(x).float() * sin.unsqueeze(unsqueeze_dim)
        )
        for x in (q, k)
    )
    return tuple(x.to(q.dtype) for x in turned)


def on_one(q: Any, k: Any, cos: Any, sin: Any, position_ids: Any = None, unsqueeze_dim: int = 1) -> Any:
    """Has one argument more."""
    return STOCK(q, k, cos, sin, unsqueeze_dim)


class AsModule(nn.Module):
    """As the package `kernels` wraps a function."""

    def forward(self, q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        return STOCK(q, k, cos, sin, unsqueeze_dim)


STOCK = modeling_llama.apply_rotary_pos_emb


@here
@pytest.mark.parametrize(("function", "rotations"), [(lazily, 0), (on_one, 0), (None, 0), (AsModule(), 2)])
def test_rotations_that_are_something_else(function: Any, rotations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", function)
    assert cuts(lc.patch(LLAMA.make(), "dense")) == (5, rotations)


class RenamedAttention(modeling_llama.LlamaAttention):
    """Takes an argument by its name before, too, as transformers translates it."""

    forward = deprecate_kwarg("states", "99.0", new_name="hidden_states")(
        shortcuts.unwrapped(modeling_llama.LlamaAttention.forward)[0]
    )


@here
@pytest.mark.filterwarnings("ignore:`states` is deprecated:FutureWarning")
def test_an_argument_that_was_renamed() -> None:
    model, plain = LLAMA.make(), LLAMA.make()
    for layer in model.model.layers:
        layer.self_attn.__class__ = RenamedAttention
    assert cuts(lc.patch(model, "dense")) == (5, 2)
    with counted() as calls:
        got = generate(model, single(LLAMA))
    assert calls["rotate_heads"] == 2 * STEPS
    assert torch.equal(got.sequences, generate(plain, single(LLAMA)).sequences)

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {"states" if name == "hidden_states" else name: x for name, x in kwargs.items()}

    model.model.layers[0].self_attn.register_forward_pre_hook(before, with_kwargs=True)
    with counted() as calls:
        got = generate(model, single(LLAMA))
    assert calls["rotate_heads"] == STEPS
    assert torch.equal(got.sequences, generate(plain, single(LLAMA)).sequences)


@here
def test_arguments_that_no_proof_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = shortcuts.Turn(STOCK, shortcuts.Same(whole=True, part=False, pairs=False, wide=False))
    q, k, angles = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 2, 16), torch.randn(2, 3, 16)
    with counted() as calls:
        for got, expected in zip(turn(q, k, angles, angles, 2), STOCK(q, k, angles, angles, 2), strict=True):
            assert torch.equal(got, expected)
        q, k = q.transpose(1, 2).bfloat16(), k.transpose(1, 2).bfloat16()
        assert turn(q, k, angles, angles)[0].dtype == torch.float32
        with pytest.raises(RuntimeError, match="must match"):
            turn(q, k, angles[..., :8], angles[..., :8])
        assert not calls
        turn(q, k, angles.bfloat16(), angles.bfloat16())
    assert calls == {"rotate_heads": 1}


@here
def test_a_failure_while_installing_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    model = LLAMA.make()
    before = snapshot(model)
    monkeypatch.setattr(shortcuts, "_rotation", fail)
    with pytest.raises(KeyboardInterrupt):
        lc.patch(model, "dense")
    assert differences(before, snapshot(model)) == []


def test_there_are_none_on_a_cpu() -> None:
    model = lc.patch(LLAMA.make(), "dense")
    assert cuts(model) == (0, 0)
    assert "one launch each" not in str(lc.report(model))


@here
def test_the_report_counts_them() -> None:
    report = lc.report(lc.patch(LLAMA.make(), "dense"))
    assert str(report).endswith("one launch each: 5 norms, 2 rotations, 14 linear layers in decode steps")


# on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "case",
    [BY_NAME[n] for n in ("llama", "qwen3", "gemma3", "olmo2", "gpt_oss", "phi3_partial")],
    ids=named,
)
def test_on_a_gpu(case: Case, dtype: torch.dtype, cuda_graph: bool) -> None:
    need("cuda")
    model = lc.patch(case.make().to("cuda", dtype), "dense", cuda_graph=cuda_graph)
    assert cuts(model) == (norms_of(model.get_decoder()), case.layers)
    inputs = {name: x.cuda() for name, x in batch(case).items()}
    got = generate(model, inputs, output_logits=True)
    used = lc.report(model).backends
    assert used["rotate_heads"] == "compiled"
    assert used["rms_norm"] == "compiled"
    with pytest.MonkeyPatch.context() as context:
        context.setattr(shortcut, "DEVICES", set())
        lc.unpatch(model)
        expected = generate(lc.patch(model, "dense", cuda_graph=cuda_graph), inputs, output_logits=True)
    if dtype == torch.float32:
        assert torch.equal(got.sequences, expected.sequences)
    first, other = got.logits[1], expected.logits[1]  # of the first step after the prompt
    torch.testing.assert_close(
        first, other, rtol=0, atol=(1e-4 if dtype == torch.float32 else 5e-2) * float(other.abs().max())
    )
