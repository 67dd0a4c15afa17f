"""`torch.compile` of a patched model: the same tokens, few graphs, made once; what is no graph says why it is none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch._dynamo.utils import counters

import hf_longctx as lc
from hf_longctx import shortcut
from hf_longctx.quantize.run import round_all
from hf_longctx.testing.models import tiny_llama

from ..methods.cases import LIMITS, LOSSY, SELECTING, Row, named
from .again import recorders
from .cases import BY_NAME
from .test_generate import batch, generate
from .tiny import Case

LLAMA = BY_NAME["llama"]
ROWS = (LIMITS[0], LOSSY[0], *SELECTING[:2])
FAMILIES = [BY_NAME[name] for name in ("gemma2", "gpt_oss", "mpt", "falcon_alibi", "qwen3_vl")]
IDS = LLAMA.prompt(40)
BETWEEN = {"what a call finds in its cache, and where its tokens go there, is no graph"}
"""Why a call in inference is cut, once before the decoder and once behind it."""


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend that runs graphs as they are, and keeps them."""

    def __init__(self) -> None:
        self.made: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.made.append(graph)
        return graph.forward

    def nodes(self) -> list[int]:
        """How many layers' attention each graph holds."""
        return [sum("hf_longctx.attention" in str(n.target) for n in graph.graph.nodes) for graph in self.made]


def reasons() -> set[str]:
    """Our own words for why there are several graphs; others' fail."""
    found = set()
    for said in counters["graph_break"]:
        assert "hf_longctx: " in said, said
        found.add(said.split("hf_longctx: ")[1].split(")")[0])
    return found


def between_only() -> bool:
    return reasons() == BETWEEN


SLOW = pytest.mark.slow
QUICK = ("dense-eager", "streaming_llm-aot_eager", "quest-aot_eager", "xattention-eager")
BACKENDS = [
    pytest.param(row, backend, id=name, marks=() if name in QUICK else SLOW)
    for row in ROWS
    for backend in ("eager", "aot_eager", "inductor")
    for name in [f"{row.name}-{backend}"]
]


@pytest.mark.parametrize(("row", "backend"), BACKENDS)
def test_generate(row: Row, backend: str) -> None:
    inputs = batch(LLAMA)
    model = lc.patch(LLAMA.make(), row.method(LLAMA))
    expected = generate(model, inputs).sequences
    model.compile(backend=backend)
    assert torch.equal(generate(model, inputs).sequences, expected)
    assert between_only()
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 4  # the decoder and the head, of a prompt and of a token
    assert torch.equal(generate(model, inputs).sequences, expected)
    assert counters["stats"]["unique_graphs"] == graphs


def test_all_layers_are_in_one_graph() -> None:
    model, graphs = lc.patch(LLAMA.make(), "dense"), Graphs()
    model.forward = torch.compile(model.forward, backend=graphs)
    generate(model, batch(LLAMA))
    assert sorted(graphs.nodes()) == [0, 0, LLAMA.layers, LLAMA.layers]


@SLOW
@pytest.mark.parametrize("case", FAMILIES, ids=named)
def test_families(case: Case) -> None:
    method = lc.Dense() if case.text_config else LOSSY[0].method(case)
    model, ids = lc.patch(case.make(), method), case.prompt(40)
    run = torch.compile(model, backend="eager")
    past: Any = (None, None)
    with torch.no_grad():
        for call in ids.split([30, 1, 9], 1):
            outs = [one(call, use_cache=True, past_key_values=own) for one, own in zip((model, run), past, strict=True)]
            assert torch.equal(outs[0].logits, outs[1].logits)
            past = [out.past_key_values for out in outs]
    assert between_only()


@pytest.mark.slow
def test_keys_that_are_rotated_when_they_are_read() -> None:
    case = BY_NAME["qwen3_vl"]
    model, ids = lc.patch(case.make(), lc.StreamingVLM(text_sink=4, text_window=9)), case.prompt(40)
    run, past = torch.compile(model, backend="eager"), (None, None)
    with torch.no_grad():
        for call in ids.split([30, 1, 9], 1):
            outs = [one(call, use_cache=True, past_key_values=own) for one, own in zip((model, run), past, strict=True)]
            assert torch.equal(outs[0].logits, outs[1].logits)
            past = (outs[0].past_key_values, outs[1].past_key_values)
    assert reasons() == BETWEEN | {"angles are kept for what reads keys, which no graph does"}


def test_it_follows_patch_and_unpatch() -> None:
    model = LLAMA.make()
    run = torch.compile(model, backend="eager")
    with torch.no_grad():
        stock = model(IDS).logits
        assert torch.equal(run(IDS).logits, stock)
        for row in (LOSSY[0], SELECTING[1], LOSSY[0]):
            lc.patch(model, row.method(LLAMA))
            expected = model(IDS).logits
            assert not torch.equal(expected, stock)
            assert torch.equal(run(IDS).logits, expected)
        lc.unpatch(model)
        out = run(IDS)
    assert torch.equal(out.logits, stock)
    assert isinstance(out.past_key_values, hf.DynamicCache)


def test_what_is_refused_is_refused_there_too() -> None:
    model = lc.patch(LLAMA.make(), "dense")
    run = torch.compile(model, backend="eager")
    with torch.no_grad():
        cache = run(IDS, use_cache=True).past_key_values
        with pytest.raises(lc.UnsupportedError, match="output_attentions=False"):
            run(IDS, output_attentions=True)
        with pytest.raises(lc.UnsupportedError, match="4-D mask"):
            run(IDS, attention_mask=torch.ones(1, 1, 40, 40))
        filled = hf.DynamicCache()
        filled.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
        with pytest.raises(TypeError, match="filled DynamicCache"):
            run(IDS, past_key_values=filled)
        assert cache.get_seq_length() == 40
        lc.patch(model, "streaming_llm")
        with pytest.raises(TypeError, match="got one made for plan 'dense'"):
            run(IDS[:, :1], past_key_values=cache)


def test_packed_texts() -> None:
    model = lc.patch(LLAMA.make(), LOSSY[0].method(LLAMA))
    position_ids = torch.arange(20).repeat(2)[None]
    run = torch.compile(model, backend="eager")
    with torch.no_grad():
        expected = model(IDS, position_ids=position_ids, use_cache=False).logits
        assert torch.equal(run(IDS, position_ids=position_ids, use_cache=False).logits, expected)
        assert not torch.equal(expected, model(IDS, use_cache=False).logits)


def test_gradients_are_those_of_the_model() -> None:
    model = lc.patch(LLAMA.make(), LOSSY[0].method(LLAMA), train=True).train()
    found = []
    for run in (model, torch.compile(model, backend="eager")):
        model.zero_grad()
        run(input_ids=IDS, labels=IDS).loss.backward()
        found.append([x.grad.clone() for x in model.parameters()])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert any("attention has no gradient in a graph" in said for said in reasons())


@SLOW
def test_an_added_sink_and_quantized_layers() -> None:
    model = tiny_llama(hidden_size=64, intermediate_size=96, head_dim=16, max_position_embeddings=512)
    round_all(model, lc.QoQConfig(4, 32, kv_bits=4))
    ids = IDS % 64
    for knobs in ({"zero_sink": True}, {"kv": "int8"}):
        lc.patch(model, "dense", **knobs)
        with torch.no_grad():
            expected = model(ids).logits
            got = torch.compile(model, backend="aot_eager")(ids).logits
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert between_only()


def test_steps_are_not_recorded_while_a_compiler_is_at_work() -> None:
    with recorders() as again:
        model = lc.patch(LLAMA.make(), "dense")
        expected = generate(model, batch(LLAMA)).sequences
        assert again.recorded
        before = again.recorded
        model.compile(backend="eager")
        assert torch.equal(generate(model, batch(LLAMA)).sequences, expected)
        assert again.recorded == before
        assert lc.report(model).eager == "torch.compile or autocast is at work"


def test_generate_compiles_nothing_by_itself() -> None:
    model = lc.patch(LLAMA.make(), "dense")
    out = generate(model, batch(LLAMA))
    assert not out.past_key_values.is_compileable
    settings = model.generation_config
    assert not model._valid_auto_compile_criteria({"past_key_values": out.past_key_values}, settings)


@pytest.mark.cuda
@pytest.mark.parametrize("row", ROWS, ids=named)
def test_on_a_gpu(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of 64 channels; without short cuts the same kernels in the same order, so the same tokens."""
    monkeypatch.setattr(shortcut, "DEVICES", set())
    case = BY_NAME["llama_wide_heads"]
    config = case.build().config
    config.head_dim = 64
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(config).eval().cuda().bfloat16()
    lc.patch(model, row.method(case), cuda_graph=False)
    inputs = {name: x.cuda() for name, x in batch(case).items()}
    expected = generate(model, inputs).sequences
    model.compile(backend="eager")
    assert torch.equal(generate(model, inputs).sequences, expected)
    assert between_only()
