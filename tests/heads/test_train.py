"""Gates: their gradient, what a step does, what is kept of a training, and which head they find."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import AttentionInterface

import hf_longctx as lc
from hf_longctx.evals import text
from hf_longctx.graph import RECORDERS
from hf_longctx.heads import gates as room
from hf_longctx.heads import load_pattern, train
from hf_longctx.heads.gates import Gates, distance, frozen, recomputed
from hf_longctx.heads.lessons import Lesson, Lessons, Task
from hf_longctx.heads.train import Settings
from hf_longctx.heads.training_state import STATE_FILE
from hf_longctx.testing import tiny_llama

from ..integration.again import recorders
from ..integration.cases import BY_NAME
from ..integration.snapshot import differences, snapshot

SINK, WINDOW = 2, 6
TASK = Task(shortest=280, longest=360, sizes=3, keys=2, words=2, seed=1)
QUICK = Settings(steps=6, rate=0.05, sink=SINK, window=WINDOW, save_every=2)


@pytest.fixture
def lessons(tiny: tuple[Any, Any]) -> Lessons:
    return Lessons(tiny[1], text.shipped(), TASK)


def lesson(tokens: int = 40, vocabulary: int = 64) -> Lesson:
    made = torch.Generator().manual_seed(3)
    return Lesson.of(torch.randint(8, vocabulary, (tokens,), generator=made), torch.arange(tokens - 12, tokens - 2))


def some_gates(heads: Sequence[int], device: torch.device, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    made = torch.Generator().manual_seed(4)
    return [torch.rand(n, generator=made, dtype=dtype).to(device).requires_grad_() for n in heads]


def exact(model: Any) -> Any:
    """In float64, its norms too, which transformers' own compute in float32."""
    model = model.double()
    for parent in [*model.modules()]:
        for name, child in parent.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                norm = torch.nn.RMSNorm(len(child.weight), child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return model


def oracle(model: Any, gates: Sequence[Tensor], given: Lesson) -> Tensor:
    """The distance from whole matrices of weights, through transformers' own registry: no code of the package."""

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **kwargs: Any) -> Any:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        far = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        near = (far >= 0) & ((far < WINDOW) | (torch.arange(q.shape[2]) < SINK))
        logits = q @ k.transpose(2, 3) * scaling
        whole, stream = (logits.masked_fill(~seen, -torch.inf).softmax(-1) @ v for seen in (far >= 0, near))
        gate = mixed[module.layer_idx].repeat_interleave(q.shape[1] // len(mixed[module.layer_idx]))[:, None, None]
        return (gate * whole + (1 - gate) * stream).transpose(1, 2), None

    AttentionInterface.register("gated_oracle", attend)
    model.set_attn_implementation("gated_oracle")
    mixed = [torch.ones_like(each) for each in gates]
    aim = model.model(given.ids[None]).last_hidden_state[0, given.marks]
    mixed = list(gates)
    return (model.model(given.ids[None]).last_hidden_state[0, given.marks] - aim).pow(2).mean()


@pytest.mark.parametrize("recompute", [False, True])
def test_gradient_is_that_of_whole_matrices_and_of_a_finite_difference(recompute: bool) -> None:
    model = exact(tiny_llama())
    alphas = some_gates([2, 2], model.device)
    with lc.patched(model, "dense"), frozen(model):
        found = distance(model, alphas, lesson(), SINK, WINDOW, recompute)
        found.backward()
        gradient = torch.stack([each.grad for each in alphas if each.grad is not None])
        for layer, head in ((0, 1), (1, 0)):
            ends = []
            for move in (1e-5, -1e-5):
                moved = [each.detach().clone() for each in alphas]
                moved[layer][head] += move
                ends.append(float(distance(model, moved, lesson(), SINK, WINDOW)))
            assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float(gradient[layer, head]), rel=1e-5)
    again = some_gates([2, 2], model.device)
    expected = oracle(model, again, lesson())
    expected.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, torch.stack([each.grad for each in again if each.grad is not None]))
    assert gradient.abs().min() > 1e-6


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "qwen3", "falcon_new", "mpt"])
def test_families_at_both_ends_of_the_gates(name: str, device: torch.device) -> None:
    """Open gates change nothing; closed ones are DuoAttention with every head streaming."""
    case = BY_NAME[name]
    model, given = case.make().to(device), lesson(vocabulary=100)
    heads = [0 if i in case.sliding else case.kv_heads for i in range(case.layers)]
    closed = [torch.zeros(n, device=device) for n in heads]
    with lc.patched(model, "dense"), torch.no_grad():
        assert float(distance(model, [1 + each for each in closed], given, SINK, WINDOW, False)) == 0.0
        apart = distance(model, closed, given, SINK, WINDOW, False)
        dense = states(model, given)
    pattern = [[0.0] * case.kv_heads] * case.layers
    with lc.patched(model, lc.DuoAttention(pattern, sparsity=1.0, sinks=SINK, window=WINDOW)), torch.no_grad():
        expected = (states(model, given) - dense).square().mean()
    assert float(expected) > 1e-4
    torch.testing.assert_close(apart, expected, rtol=1e-3, atol=1e-6)


def test_bfloat16_has_the_gradient_of_float32_but_for_rounding(device: torch.device) -> None:
    sizes = {"hidden_size": 128, "head_dim": 64, "max_position_embeddings": 1024}
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_llama(**sizes).to(device, dtype)
        alphas = some_gates([2, 2], device, torch.float32)
        with lc.patched(model, "dense"), frozen(model):
            distance(model, alphas, lesson(400), SINK, WINDOW).backward()
        found.append(torch.cat([each.grad for each in alphas if each.grad is not None]))
    assert found[1].dtype == torch.float32
    assert torch.cosine_similarity(found[0], found[1], dim=0) > 0.99
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 0.1


def states(model: Any, given: Lesson) -> Tensor:
    decoder = model.get_decoder()
    found: Tensor = decoder(input_ids=given.ids[None].to(decoder.device), use_cache=False).last_hidden_state
    return found[0, given.marks.to(decoder.device)]


def test_layers_that_run_again_hold_less_and_are_as_they_were() -> None:
    model = tiny_llama()
    before = snapshot(model)
    held = []
    for recompute in (True, False):
        sizes: list[int] = []

        def note(x: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(x.numel())
            return x

        with lc.patched(model, "dense"), frozen(model), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            distance(model, some_gates([2, 2], model.device, torch.float32), lesson(), SINK, WINDOW, recompute)
        held.append(sum(sizes))
    assert held[0] < held[1] / 4
    assert differences(before, snapshot(model)) == []
    with pytest.raises(ValueError, match="expected layers that can be run again"), recomputed(torch.nn.Linear(2, 2)):
        pass


def test_dropout_of_a_model_in_train_mode_is_off_and_its_mode_and_weights_come_back() -> None:
    model = tiny_llama(attention_dropout=0.5).train()
    model.lm_head.weight.requires_grad_(False)
    with lc.patched(model, "dense"), frozen(model):
        once, twice = (distance(model, some_gates([2, 2], model.device), lesson(), SINK, WINDOW) for _ in "ab")
    assert torch.equal(once, twice)
    assert model.training
    assert [name for name, weight in model.named_parameters() if not weight.requires_grad] == ["lm_head.weight"]


# lessons ------------------------------------------------------------------------------------------------------------


def test_a_lesson_hides_its_keys_and_marks_their_tokens(tiny: tuple[Any, Any], lessons: Lessons) -> None:
    tokenizer = tiny[1]
    whole = Lessons(tokenizer, text.shipped(), replace(TASK, mode="code"))
    lengths = set()
    for index in range(8):
        made, code = lessons[index], whole[index]
        assert made.ids.equal(code.ids)
        assert TASK.shortest <= len(made.ids) <= TASK.longest
        lengths.add(len(made.ids))
        said = tokenizer.decode(made.ids)
        book, asked = said.split("</book>")
        first = asked.split("first pass key to the vault?\nPass key: ")[1].split("\n\n")[0]
        second = asked.split("second pass key to the vault?\nPass key: ")[1].split("\n\n")[0]
        assert tokenizer.decode(made.ids[made.marks]) == f" {first} {second}"
        assert f"first pass key to the vault: {first}\n\n" in book
        assert f"second pass key to the vault: {second}\n\n" in book
        assert tokenizer.decode(made.ids[code.marks]) == f"\n</book>{asked}"
        assert made.ids.equal(lessons[index].ids)
    assert lengths == {280, 320, 360} == set(TASK.lengths)
    assert not lessons[0].ids[:100].equal(lessons[1].ids[:100])


def test_lessons_without_room_for_a_book_are_refused(tiny: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match=r"lessons of more than \d+ tokens; got 60"):
        Lessons(tiny[1], text.shipped(), replace(TASK, shortest=60))


# steps --------------------------------------------------------------------------------------------------------------


def test_the_rate_goes_up_stays_and_goes_down() -> None:
    rates = [Settings(steps=20, rate=1.0).rate_at(step) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[15:] == [1.0, 1.0, 0.75, 0.5, 0.25]
    assert set(rates[4:17]) == {1.0}
    published = Settings()
    assert (published.rate_at(0), published.rate_at(400), published.rate_at(1999)) == (0.002, 0.02, 0.002)
    assert Settings(steps=20, rate=1.0, warmup=0, decay=0).rate_at(0) == 1.0


def test_gates_stay_within_0_and_1(tiny: tuple[Any, Any], lessons: Lessons, tmp_path: Path) -> None:
    priced = train.run(tiny[0], lessons, replace(QUICK, rate=3.0, weight=50.0), tmp_path / "a")
    assert priced.gates == ((0.0, 0.0), (0.0, 0.0))
    free = train.run(tiny[0], lessons, replace(QUICK, rate=3.0, weight=0.0), tmp_path / "b")
    assert free.gates == ((1.0, 1.0), (1.0, 1.0))


def test_the_model_is_as_it_was_and_the_files_load(tiny: tuple[Any, Any], lessons: Lessons, tmp_path: Path) -> None:
    model, before = tiny[0], snapshot(tiny[0])
    pattern = train.run(model, lessons, QUICK, tmp_path)
    assert differences(before, snapshot(model)) == []
    assert len({gate for row in pattern.gates for gate in row}) > 2
    read = load_pattern(tmp_path)
    assert (read.gates, read.sink, read.window) == (pattern.gates, SINK, WINDOW)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["lr"], config["reg_weight"], config["num_passkeys"]) == (0.05, 0.05, 2)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "full_attention_heads.tsv",
        "run_meta.json",
        STATE_FILE,
    }
    ids = torch.arange(40)[None]
    with torch.no_grad():
        loaded = lc.patch(model, lc.DuoAttention(pattern=tmp_path))(ids).logits
        lc.patch(model, lc.DuoAttention(pattern=[list(row) for row in pattern.gates], sinks=SINK, window=WINDOW))
        assert torch.equal(loaded, model(ids).logits)


def test_the_same_seed_gives_the_same_gates_another_does_not(
    tiny: tuple[Any, Any], lessons: Lessons, tmp_path: Path
) -> None:
    first = train.run(tiny[0], lessons, QUICK, tmp_path / "a")
    assert train.run(tiny[0], lessons, QUICK, tmp_path / "b") == first
    assert train.run(tiny[0], lessons, replace(QUICK, recompute=False), tmp_path / "c") == first
    other = Lessons(tiny[1], text.shipped(), replace(TASK, seed=2))
    assert train.run(tiny[0], other, QUICK, tmp_path / "d") != first


class Interrupted(Exception):
    pass


def test_a_resumed_training_ends_as_one_that_was_never_interrupted(
    tiny: tuple[Any, Any], lessons: Lessons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(QUICK, accumulate=2)
    whole = train.run(tiny[0], lessons, settings, tmp_path / "whole")
    broken = tmp_path / "broken"
    calls, real = [], distance

    def breaks(*args: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 2 * 5 + 1:  # in the middle of step 6: the state is that of step 4
            raise Interrupted
        return real(*args)

    monkeypatch.setattr(train, "distance", breaks)
    with pytest.raises(Interrupted):
        train.run(tiny[0], lessons, settings, broken)
    assert not (broken / "full_attention_heads.tsv").exists()
    monkeypatch.setattr(train, "distance", real)
    with pytest.raises(ValueError, match=r"expected no former state in .*; got one. Pass --resume"):
        train.run(tiny[0], lessons, settings, broken)
    with pytest.raises(ValueError, match=r"to be made with rate=0.01; got 0.05"):
        train.run(tiny[0], lessons, replace(settings, rate=0.01), broken, resume=True)
    assert train.run(tiny[0], lessons, settings, broken, resume=True) == whole
    assert (broken / STATE_FILE).read_bytes() == (tmp_path / "whole" / STATE_FILE).read_bytes()


def test_nothing_in_a_lesson_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a stream is captured a number that is asked for is an error, as it is of tensors without data."""
    for name in ("is_available", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    model = tiny_llama().to("meta")
    alphas = some_gates([2, 2], model.device, torch.float32)
    given = Lesson(torch.zeros(400, dtype=torch.int64, device="meta"), torch.zeros(400, device="meta"))
    with lc.patched(model, "dense"), frozen(model):
        apart = distance(model, alphas, given, SINK, WINDOW, False)
        assert [each.device.type for each in torch.autograd.grad(apart, alphas)] == ["meta", "meta"]


class Again:
    """In place of a CUDA graph: runs again what was recorded, on its inputs as they are now, into the same memory."""

    nbytes = 1
    lengths: ClassVar[list[int]] = []

    def __init__(self, run: Any, device: torch.device, pool: list[Any]) -> None:
        self.run, self.out = run, run()
        self.lengths.append(len(run.args[0].ids))

    @staticmethod
    def first(run: Any, device: torch.device) -> Any:
        return run()

    def replay(self) -> Tensor:
        return self.out.copy_(self.run())


def test_a_length_is_recorded_once_and_gates_are_as_without(
    tiny: tuple[Any, Any], lessons: Lessons, tmp_path: Path
) -> None:
    settings = replace(QUICK, steps=12, accumulate=2)
    eager = train.run(tiny[0], lessons, settings, tmp_path / "eager")
    Again.lengths.clear()
    with recorders(Again):
        assert train.run(tiny[0], lessons, settings, tmp_path / "recorded") == eager
    assert len(Again.lengths) == len(set(Again.lengths)) == len(TASK.lengths)
    assert set(Again.lengths) == set(TASK.lengths)


class Never(Again):
    def __init__(self, run: Any, device: torch.device, pool: list[Any]) -> None:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")


def test_what_cannot_be_recorded_is_computed_and_told(tiny: tuple[Any, Any], lessons: Lessons, tmp_path: Path) -> None:
    console = Console(record=True, width=120, file=io.StringIO())
    eager = train.run(tiny[0], lessons, QUICK, tmp_path / "eager")
    with recorders(Never):
        assert train.run(tiny[0], lessons, QUICK, tmp_path / "o", console=console) == eager
    assert "not recorded as CUDA graphs: operation not permitted\n" in console.export_text()


@pytest.mark.cuda
def test_lessons_are_replayed_and_nothing_is_compiled(lessons: Lessons, tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    model = tiny_llama(hidden_size=128, head_dim=64, max_position_embeddings=1024, vocab_size=1024).cuda()
    settings, console = replace(QUICK, steps=12, accumulate=2), Console(record=True, file=io.StringIO())
    before = dict(counters["stats"])
    recorded = train.run(model, lessons, settings, tmp_path / "recorded", console=console)
    assert "not recorded" not in console.export_text()
    assert dict(counters["stats"]) == before
    own = RECORDERS.pop("cuda")
    try:
        eager = train.run(model, lessons, settings, tmp_path / "eager")
    finally:
        RECORDERS["cuda"] = own
    torch.testing.assert_close(torch.tensor(recorded.gates), torch.tensor(eager.gates), rtol=1e-3, atol=1e-3)
    assert len({gate for row in recorded.gates for gate in row}) > 2


def test_a_damaged_state_is_named(tiny: tuple[Any, Any], lessons: Lessons, tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=rf"{STATE_FILE}: expected a state of `heads train`"):
        train.run(tiny[0], lessons, QUICK, tmp_path, resume=True)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_and_leaves_the_last_good_state(
    what: str, tiny: tuple[Any, Any], lessons: Lessons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.run(tiny[0], lessons, replace(QUICK, steps=4), tmp_path / "short")
    calls, real = [], distance

    def breaks(model: Any, gates: Sequence[Tensor], *args: Any) -> Tensor:
        calls.append(1)
        found = real(model, gates, *args)
        if len(calls) <= 5:
            return found
        return found * torch.nan if what == "loss" else found + 0 * (gates[0] - gates[0].detach()).sqrt().sum()

    monkeypatch.setattr(train, "distance", breaks)
    with pytest.raises(RuntimeError, match=r"step 6: expected a finite loss and gradient; got .*after step 4"):
        train.run(tiny[0], lessons, QUICK, tmp_path / "o")
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["run_meta.json", STATE_FILE]
    monkeypatch.setattr(train, "distance", real)
    assert len(train.run(tiny[0], lessons, QUICK, tmp_path / "o", resume=True).gates) == 2


def test_the_gate_of_the_head_that_matters_ends_highest(
    tiny: tuple[Any, Any], lessons: Lessons, tmp_path: Path
) -> None:
    """All other heads say nothing, so that what they see makes no difference."""
    model = tiny[0]
    with torch.no_grad():
        for layer, keeps in ((0, slice(0, 0)), (1, slice(32, 64))):  # query heads 2 and 3: KV head 1
            weight = model.model.layers[layer].self_attn.o_proj.weight
            kept = weight[:, keeps].clone()
            weight.zero_()
            weight[:, keeps] = kept
    pattern = train.run(model, lessons, replace(QUICK, steps=60, rate=0.1, weight=0.01), tmp_path)
    others = [pattern.gates[0][0], pattern.gates[0][1], pattern.gates[1][0]]
    assert max(others) < 0.05
    assert pattern.gates[1][1] > 0.3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 0}, "steps of at least 1; got 0"),
        ({"warmup": -1}, "warmup of at least 0; got -1"),
        ({"rate": 0.0}, "rate above 0; got 0.0"),
        ({"weight": float("nan")}, "weight of at least 0; got nan"),
        ({"accumulate": 0}, "accumulate of at least 1; got 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Settings(**change)


def test_what_teaches_nothing_or_could_not_be_written_is_refused_first(
    tiny: tuple[Any, Any], lessons: Lessons, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"lessons of more than sink \+ window = 384 tokens; got 280"):
        train.run(tiny[0], lessons, Settings(), tmp_path / "o")
    with pytest.raises(lc.UnsupportedError, match="heads train: expected a layer with full attention"):
        train.run(BY_NAME["mistral_sliding"].make(), lessons, QUICK, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_layers_with_a_window_of_their_own_have_no_gates() -> None:
    gates = Gates([0, 2])
    assert [tuple(each.shape) for each in gates()] == [(0,), (2,)]
    assert gates.rows([2, 2]) == ((0.0, 0.0), (1.0, 1.0))
    assert gates.sparsity == 0.0
    assert room.ROLE == 0.5


@pytest.mark.slow
def test_two_processes_train_as_one_does_that_reads_both_their_lessons(folder: Path, tmp_path: Path) -> None:
    args = "--steps 3 --keys 1 --words 2 --sink 2 --window 6 --shortest 200 --longest 240 --rate 0.05"
    command = [sys.executable, "-m", "hf_longctx", "heads", "train", "-m", str(folder), *args.split()]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    both = [
        subprocess.Popen(
            [*command, "-o", str(tmp_path / "two"), "--device", "cpu"],
            env={**shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert ["KV heads have a gate" in each for each in said] == [True, False]
    assert (
        subprocess.run([*command, "-o", str(tmp_path / "one"), "--device", "cpu", "--accumulate", "2"]).returncode == 0
    )
    one, two = (torch.tensor(load_pattern(tmp_path / name).gates) for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
    assert len(one.unique()) > 2
