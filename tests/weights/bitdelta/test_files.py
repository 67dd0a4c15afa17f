"""Files of deltas: what is written, what is refused, and how a run goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import hf_longctx as lc
from hf_longctx.weights.bitdelta import compress
from hf_longctx.weights.bitdelta.bits import Grain
from hf_longctx.weights.bitdelta.format import metadata, read

from . import pairs

QUERY = "model.layers.0.self_attn.q_proj.weight"


def test_what_is_equal_is_not_stored(make_pair: Callable[..., Any]) -> None:
    pair = make_pair(but=("mlp", "embed", "norm", "lm_head"))
    tensors = load_file(pair.folder / "model.safetensors")
    assert {name.removesuffix("_scales").split(".")[-2] for name in tensors} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert tensors[QUERY].dtype == torch.int32
    assert tensors[QUERY].shape == (1, 64, 2)
    weights = sum(x.numel() for x in pair.tuned.state_dict().values())
    signs = sum(x.nbytes for name, x in tensors.items() if not name.endswith("_scales"))
    assert pair.sizes.parts == {"signs": signs, "scales": 8 * 4}
    assert pair.sizes.ratio == pytest.approx(2 * weights / (signs + 32))
    assert pair.sizes.shared == 2 * (weights - signs * 8)


def test_kept_in_16_or_8_bits(make_pair: Callable[..., Any]) -> None:
    pair = make_pair(dense="int8")
    tensors = load_file(pair.folder / "model.safetensors")
    assert tensors["model.norm.weight"].dtype == torch.bfloat16
    assert tensors["lm_head.weight"].dtype == torch.int8
    tuned = pair.tuned.lm_head.weight
    error = (read(pair.folder).weight("lm_head.weight") - tuned).abs()
    assert (error <= tuned.abs().amax(-1, keepdim=True) / 254 + 1e-7).all()
    assert pair.sizes.parts["head"] == 64 * 64 + 64 * 4


def test_inputs_that_fill_no_words_are_kept(make_pair: Callable[..., Any]) -> None:
    pair = make_pair(facts={"intermediate_size": 48})
    down = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(load_file(pair.folder / "model.safetensors")[down], pair.tuned.state_dict()[down])
    model = LlamaForCausalLM.from_pretrained(pair.base_folder)
    lc.deltas.load(model, {"it": pair.folder})
    ids = torch.randint(2, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    logits = model(ids, adapter_names=["it", "__base__"]).logits
    state = pairs.stands_for(pair.base, pair.tuned)
    with torch.no_grad():
        for name, module in state.named_modules():
            if name.endswith("down_proj"):
                module.weight.copy_(pair.tuned.get_submodule(name).weight)
    torch.testing.assert_close(logits[0], state(ids).logits[0], atol=5e-6, rtol=0)


def part_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_a_run_that_was_interrupted_goes_on(make_pair: Callable[..., Any], tmp_path: Path) -> None:
    pair, out = make_pair(), tmp_path / "parts"
    settings = compress.Settings(dense="native")

    def stop(done: int, total: int) -> None:
        assert total == 21
        if len(part_names(out)) == 2 and done < total:
            raise KeyboardInterrupt

    base, tuned = str(pair.base_folder), str(pair.tuned_folder)
    with pytest.raises(KeyboardInterrupt):
        compress.run(base, tuned, out, settings, part_elements=9000, on_tensor=stop)
    assert len(part_names(out)) == 2
    assert not (out / "config.json").exists()
    times = [(out / name).stat().st_mtime_ns for name in part_names(out)]
    with pytest.raises(ValueError, match="one of other settings or models"):
        compress.run(base, tuned, out, compress.Settings(planes=2), part_elements=9000)
    sizes = compress.run(base, tuned, out, settings, part_elements=9000)
    assert [(out / name).stat().st_mtime_ns for name in part_names(out)[:2]] == times
    whole, parts = read(pair.folder), read(out)
    assert whole.tensors().keys() == parts.tensors().keys()
    assert all(torch.equal(x, parts.tensors()[name]) for name, x in whole.tensors().items())
    assert whole.base.digest == parts.base.digest
    assert sizes.parts == pair.sizes.parts
    with pytest.raises(ValueError, match=r"nothing else in .*; got config.json"):
        compress.run(base, tuned, out, settings)


def test_one_matrix_of_each_model_is_in_memory(make_pair: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of checkpoints that are alive at a time: two, the base's and the fine-tune's."""
    from hf_longctx.weights.bitdelta.checkpoint import Checkpoint

    pair, alive, most = make_pair(), [0], [0]
    stock = Checkpoint.tensor

    class Counted(torch.Tensor):
        def __del__(self) -> None:
            alive[0] -= 1

    def counted(self: Checkpoint, key: str) -> torch.Tensor:
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        return stock(self, key).as_subclass(Counted)

    monkeypatch.setattr(Checkpoint, "tensor", counted)
    monkeypatch.setattr(Counted, "__torch_function__", torch._C._disabled_torch_function_impl)
    compress.run(str(pair.base_folder), str(pair.tuned_folder), pair.folder / "again", compress.Settings())
    assert most == [2]


def test_no_pair(make_pair: Callable[..., Any], tmp_path: Path) -> None:
    pair = make_pair()
    for family, facts, said in (
        ("qwen3, norms of heads", {}, "a fine-tune of the base's type 'llama'; got qwen3"),
        ("llama", {"hidden_size": 32}, "the same shape in base and fine-tune"),
    ):
        other = pairs.save(pairs.make(family, **facts), tmp_path / f"other {family}")
        with pytest.raises(ValueError, match=said):
            lc.deltas.compress(pair.base_folder, other, tmp_path / f"none {family}")
        assert not (tmp_path / f"none {family}" / "config.json").exists()
    with pytest.raises(FileNotFoundError, match="a folder, or an id on the hub"):
        lc.deltas.compress("./nowhere", pair.base_folder, tmp_path / "none")
    with pytest.raises(ValueError, match="one of 16, int8, native"):
        lc.deltas.compress(pair.base_folder, pair.tuned_folder, tmp_path / "none", dense="8")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change tensors of a delta as a program would that knows its format."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        base = json.loads(file.metadata()["base"])
    change(tensors)
    save_file(tensors, path, metadata(tensors, base))


def flip_a_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(bytes(content))


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def zero_scale(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors[QUERY + "_scales"].zero_())


def wrong_shape(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({QUERY: tensors[QUERY].repeat(1, 2, 1)}))


def no_scale(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(QUERY + "_scales"))


def not_finite(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors["model.norm.weight"].fill_(torch.inf))


def unknown_name(folder: Path) -> None:
    seventh = QUERY.replace("layers.0", "layers.7")
    rewrite(folder, lambda x: x.update({seventh + end: x[QUERY + end].clone() for end in ("", "_scales")}))


def settings(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "rms_norm_eps": 0.1}))


def version(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["version"] = 2
    path.write_text(json.dumps(config))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def other_digest(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["base_digest"] = "0" * 64
    path.write_text(json.dumps(config))


DAMAGE = {
    flip_a_bit: "the values that were written; got others",
    cut: "a whole safetensors file",
    zero_scale: "scales other than zero",
    wrong_shape: r"a tensor of shape \(64, 64\); got \(128, 64\)",
    no_scale: "scales beside the signs",
    not_finite: "finite numbers",
    unknown_name: "a name in LlamaForCausalLM; got none",
    settings: "the base's configuration; got rms_norm_eps: 0.1 in place of 1e-06",
    version: "version 1; got 2",
    no_config: "the folder of a delta, with a config.json",
    other_digest: "checksums of the base with digest 0000000000000000; got others",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_bad_delta_is_refused_and_the_model_stays(
    llama_pairs: dict[str, Any], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    bad = shutil.copytree(llama_pairs["law"].folder, tmp_path / "bad")
    damage(bad)
    model = LlamaForCausalLM.from_pretrained(llama_pairs["law"].base_folder)
    kinds = (ValueError, FileNotFoundError, NotImplementedError)
    with pytest.raises(kinds, match=DAMAGE[damage]):
        lc.deltas.load(model, {"maths": llama_pairs["maths"].folder, "bad": bad})
    assert "generate" not in vars(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    lc.deltas.load(model, {"maths": llama_pairs["maths"].folder}, slots=2)
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids, adapter_names=["maths"]).logits
    with pytest.raises(kinds, match=DAMAGE[damage]):
        model.add_delta("bad", bad)
    assert model.deltas() == {"maths": "device"}
    assert torch.equal(model(ids, adapter_names=["maths"]).logits, before)


def test_a_delta_of_another_base_is_refused(llama_pairs: dict[str, Any]) -> None:
    model = LlamaForCausalLM.from_pretrained(llama_pairs["law"].base_folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 0.01
    with pytest.raises(ValueError, match=r"other weights in model.layers.1.mlp.up_proj.weight. Load the base"):
        lc.deltas.load(model, {"law": llama_pairs["law"].folder})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_16_bits_is_the_same_base(llama_pairs: dict[str, Any], dtype: torch.dtype) -> None:
    model = LlamaForCausalLM.from_pretrained(llama_pairs["law"].base_folder, dtype=dtype)
    lc.deltas.load(model, {"law": llama_pairs["law"].folder})
    assert model.deltas() == {"law": "device"}


def test_scales_are_as_fine_as_asked(make_pair: Callable[..., Any]) -> None:
    pair = make_pair(scales="32", bits=3)
    matrix = read(pair.folder).matrices[QUERY]
    assert matrix.bits.shape == (3, 64, 2)
    assert matrix.scales.shape == (3, 64, 2)
    difference = pair.tuned.state_dict()[QUERY] - pair.base.state_dict()[QUERY]
    torch.testing.assert_close(matrix.scales[0], Grain.of("32").mean(difference))
