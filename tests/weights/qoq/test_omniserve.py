"""Published QServe files: bytes as their description has them, what becomes of them, and what is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from hf_longctx.quantize import omniserve as room
from hf_longctx.quantize.saving import save_model
from hf_longctx.testing.models import tiny_llama
from hf_longctx.weights.qoq import omniserve
from hf_longctx.weights.qoq.config import QoQConfig
from hf_longctx.weights.qoq.linear import QoQLinear

IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


def packed(codes: torch.Tensor) -> torch.Tensor:
    """`qweight` by the description, place by place."""
    rows, columns = codes.shape
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    a, b, c, d = row // 32, row // 16 % 2, row // 8 % 2, row % 8
    e, f, g, h = column // 32, column // 16 % 2, column // 4 % 4, column % 4
    byte = ((a * (columns // 32) + e) * 32 + 4 * d + g) * 16 + 8 * f + 4 * c + h
    out = torch.zeros(rows * columns // 2, dtype=torch.int64)
    out.index_add_(0, byte.flatten(), (codes.long() << 4 * b.expand(rows, columns)).flatten())
    return out.to(torch.uint8).view(torch.int8).view(rows, columns // 2)


GOLDEN = [  # byte, row and column of its low nibble, and of its high one, in a tile of 32 x 32
    (0, (0, 0), (16, 0)),
    (1, (0, 1), (16, 1)),
    (4, (8, 0), (24, 0)),
    (8, (0, 16), (16, 16)),
    (16, (0, 4), (16, 4)),
    (64, (1, 0), (17, 0)),
    (511, (15, 31), (31, 31)),
]


@pytest.mark.parametrize(("byte", "low", "high"), GOLDEN)
def test_golden_bytes(byte: int, low: tuple[int, int], high: tuple[int, int]) -> None:
    stored = torch.zeros(512, dtype=torch.uint8)
    stored[byte] = 0xA5
    codes = omniserve.unpack_nibbles(stored.view(torch.int8).view(32, 16))
    assert codes.nonzero().tolist() == sorted([list(low), list(high)])
    assert (int(codes[low]), int(codes[high])) == (5, 10)


def test_codes_of_several_tiles_come_back() -> None:
    codes = torch.randint(0, 16, (64, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(omniserve.unpack_nibbles(packed(codes)), codes)


def test_rows_of_group_scales() -> None:
    stored = torch.tensor([[0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27]], dtype=torch.int8)
    rest = torch.tensor([[4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31]], dtype=torch.int8)
    whole = torch.cat((stored, rest, stored + 32, rest + 32), 1)
    assert torch.equal(omniserve.unpermute(whole), torch.arange(64, dtype=torch.int8)[None])


def published(
    kind: str, folder: Path, change: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, torch.Tensor]:
    """A folder like the published ones; gives the weight that each quantized layer stands for."""
    model = tiny_llama(**SIZES, attention_bias=kind == "channel")
    made = torch.Generator().manual_seed(5)
    state: dict[str, Any] = {}
    dense: dict[str, torch.Tensor] = {}

    def drawn(*shape: int, most: int) -> torch.Tensor:
        return torch.randint(0, most, shape, generator=made)

    for name, x in model.state_dict().items():
        prefix, _, last = name.rpartition(".")
        if "proj" not in name or last == "bias":
            state[name] = torch.ones_like(x).half() if "norm" in name else x.half()
            continue
        rows, columns = x.shape
        scale = (torch.rand(rows, generator=made) * 0.02 + 0.01).half()
        if kind == "w8":
            values = drawn(rows, columns, most=255).sub(127).to(torch.int8)
            state[f"{prefix}.weight"], state[f"{prefix}.dequant_scale"] = values, (scale / 8).float()
            dense[prefix] = values.float() * state[f"{prefix}.dequant_scale"][:, None]
            continue
        codes = drawn(rows, columns, most=16).to(torch.uint8)
        state[f"{prefix}.qweight"] = packed(codes)
        if kind == "channel":
            zeros = (drawn(rows, most=16).float() * scale).half()
            state[f"{prefix}.s1_scales"], state[f"{prefix}.s1_szeros"] = scale, zeros
            dense[prefix] = codes.float() * scale.float()[:, None] - zeros.float()[:, None]
            continue
        groups = columns // 128
        steps = drawn(rows, groups, most=8) + 1
        zero = torch.minimum(drawn(rows, groups, most=16), 127 // steps)
        order = torch.tensor([32 * (i // 32) + i % 4 * 8 + i % 32 // 4 for i in range(rows)])
        scale = scale / 16
        state[f"{prefix}.s1_scales"] = scale
        state[f"{prefix}.s2_scales"] = steps.T[:, order].to(torch.int8)
        state[f"{prefix}.s2_zeros"] = (-zero * steps).T[:, order].to(torch.int8)
        whole = (codes.view(rows, groups, 128) - zero[..., None]) * steps[..., None]
        dense[prefix] = whole.flatten(1).float() * scale.float()[:, None]
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    if change is not None:
        change(state)
    folder.mkdir(exist_ok=True)
    model.config.dtype = torch.float16
    model.config.save_pretrained(folder)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00004.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save(state, folder / omniserve.FILE)
    return dense


@pytest.mark.parametrize(("kind", "bits", "group"), [("channel", 4, -1), ("group", 4, 128), ("w8", 8, -1)])
def test_a_published_folder_becomes_one_that_loads(kind: str, bits: int, group: int, tmp_path: Path) -> None:
    dense = published(kind, tmp_path / "in")
    assert room.found(tmp_path / "in")
    save_model(*room.read(tmp_path / "in"), tmp_path / "out", None)
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    config = model.config.quantization_config
    assert (config.wbits, config.group_size) == (bits, group)
    for name, expected in dense.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, QoQLinear)
        assert torch.equal(layer.dequantized(), expected)
    stored = torch.load(tmp_path / "in" / omniserve.FILE, weights_only=True)
    assert torch.equal(model.lm_head.weight, stored["lm_head.weight"].float())
    if kind == "channel":
        assert torch.equal(
            model.model.layers[1].self_attn.q_proj.bias.half(), stored["model.layers.1.self_attn.q_proj.bias"]
        )
    assert model(IDS).logits.isfinite().all()


def loaded(folder: Path, **more: Any) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=QoQConfig(format="omniserve"), **more)


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize(("kind", "bits", "group"), [("channel", 4, -1), ("group", 4, 128), ("w8", 8, -1)])
def test_a_published_folder_loads_as_it_is(kind: str, bits: int, group: int, index: bool, tmp_path: Path) -> None:
    dense = published(kind, tmp_path / "in")
    if not index:
        (tmp_path / "in" / "model.safetensors.index.json").unlink()
    before = sorted(path.name for path in (tmp_path / "in").iterdir())
    model, told = loaded(tmp_path / "in", dtype=torch.float32, device_map={"": "cpu"}, output_loading_info=True)
    assert not any(told[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == before
    config = model.config.quantization_config
    assert (config.wbits, config.group_size) == (bits, group)
    for name, expected in dense.items():
        assert torch.equal(model.get_submodule(name).dequantized(), expected)
    stored = torch.load(tmp_path / "in" / omniserve.FILE, weights_only=True)
    assert torch.equal(model.model.embed_tokens.weight, stored["model.embed_tokens.weight"].float())
    model.save_pretrained(tmp_path / "out")
    assert "format" not in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_config_serves_twice(tmp_path: Path) -> None:
    published("group", tmp_path)
    config = QoQConfig(format="omniserve")
    first, second = (hf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config) for _ in range(2))
    assert torch.equal(first(IDS).logits, second(IDS).logits)
    assert config.format == "omniserve"


def test_what_is_no_published_folder_is_refused(tmp_path: Path) -> None:
    tiny_llama(**SIZES).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected pytorch_model\.bin in the model's folder; got none"):
        loaded(tmp_path)
    torch.save({"lm_head.weight": torch.ones(2)}, tmp_path / omniserve.FILE)
    with pytest.raises(ValueError, match=r"expected quantized layers in pytorch_model\.bin; got none"):
        loaded(tmp_path)
    with pytest.raises(ValueError, match="expected weights_only=True"):
        loaded(tmp_path, weights_only=False)
    with pytest.raises(ValueError, match="expected format 'omniserve' or None; got 'awq'"):
        QoQConfig(format="awq")


def test_without_a_word_a_published_folder_is_not_made_up(tmp_path: Path) -> None:
    published("channel", tmp_path)
    with pytest.raises(OSError, match="model-00001-of-00004"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_head_beside_a_tied_embedding_is_refused(tmp_path: Path) -> None:
    published("channel", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(ValueError, match=r"another shape or value: lm_head\.weight"):
        loaded(tmp_path)


def test_a_zero_beyond_a_byte_comes_round(tmp_path: Path) -> None:
    def change(state: dict[str, Any]) -> None:
        name = "model.layers.0.mlp.up_proj"
        rows = len(state[f"{name}.s1_scales"])
        codes = torch.full((rows, 128), 15, dtype=torch.uint8)
        codes[:, ::2] = 9  # 9 * 16 - 200 = -56, 15 * 16 - 200 = 40
        state[f"{name}.qweight"] = packed(codes)
        state[f"{name}.s2_scales"] = torch.full((1, rows), 16, dtype=torch.int8)
        state[f"{name}.s2_zeros"] = torch.full((1, rows), 256 - 200, dtype=torch.int8)

    published("group", tmp_path, change)
    model, _ = room.read(tmp_path)
    layer = model.model.layers[0].mlp.up_proj
    assert torch.equal(layer.dequantized()[:, :2], torch.tensor([-56.0, 40.0]) * layer.weight_scale[:, None])


NAME = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop(f"{NAME}.s1_scales"), f"a tensor in {NAME}.s1_scales; got none"),
        (lambda s: s.pop(f"{NAME}.s2_zeros"), f"a tensor in {NAME}.s2_zeros; got none"),
        (lambda s: s.update({f"{NAME}.s1_scales": torch.ones(3).half()}), f"in {NAME}.s1_scales; got .*float16 .3."),
        (lambda s: s.update({f"{NAME}.s1_szeros": torch.ones(128).half()}), f"nothing of that name .* in {NAME}.s1_sz"),
        (lambda s: s["model.layers.1.input_layernorm.weight"].fill_(1.5), "ones.*layers.1.input_layernorm.*0.5 away"),
        (lambda s: [s.pop(n) for n in list(s) if n.startswith(f"{NAME}.")], f"missing: {NAME}.qweight"),
        (
            lambda s: s.pop("lm_head.weight") is s.pop("model.embed_tokens.weight"),
            "missing: .*model.embed_tokens.weight",
        ),
        (lambda s: s.update({"model.more": torch.ones(2)}), "too many: model.more"),
        (lambda s: s.update({"lm_head.weight": torch.ones(3, 128)}), "another shape or value: lm_head.weight"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(change: Any, said: str, tmp_path: Path) -> None:
    published("group", tmp_path, change)
    with pytest.raises(ValueError, match=said):
        room.read(tmp_path)


def test_norms_may_be_left_out(tmp_path: Path) -> None:
    published("w8", tmp_path, lambda state: [state.pop(name) for name in list(state) if "norm" in name])
    model, _ = room.read(tmp_path)
    assert model.model.norm.weight.eq(1).all()


class _Code:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("was_run"),))


def test_code_in_a_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a.qweight": _Code()}, tmp_path / omniserve.FILE)
    with pytest.raises(ValueError, match="a file of tensors alone"):
        room.found(tmp_path)
    (tmp_path / omniserve.FILE).write_bytes(pickle.dumps(_Code()))
    assert not room.found(tmp_path)
    with pytest.raises(ValueError, match="a file of tensors alone"):
        omniserve.open_file(tmp_path / omniserve.FILE)
    assert not (tmp_path / "was_run").exists()


def test_the_command_converts(call: Any, tmp_path: Path) -> None:
    published("channel", tmp_path / "in")
    code, out, err = call("quantize", str(tmp_path / "in"), "-o", str(tmp_path / "out"))
    assert code == 0, err
    assert "Converted" in out
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (told["quant_method"], told["wbits"], told["group_size"]) == ("qoq", 4, -1)
    assert (tmp_path / "out" / "model.safetensors").exists()
