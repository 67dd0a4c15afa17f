"""Methods and peers at several lengths: what is counted, beside what, and what happens when a cell fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hf_longctx.bench import cost, model, peers, show
from hf_longctx.bench.live import held, reached
from hf_longctx.bench.model import Settings
from hf_longctx.bench.rows import Row
from hf_longctx.configs import build
from hf_longctx.patch import state_of

CPU = torch.device("cpu")
SETTINGS = Settings(tokens=3, runs=2)
NEW = SETTINGS.tokens + cost.SETTLE
A_TOKEN = 2 * 2 * 2 * 16 * 4  # keys and values, 2 layers, 2 heads of 16 channels, float32
CONFIG = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "small.json").write_text(json.dumps(CONFIG))
    return tmp_path / "small.json"


def others(names: str) -> list[peers.Peer]:
    return peers.choose(names, CPU)[0]


def test_every_cell_has_a_row_beside_dense(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    loaded, tokenizer = tiny
    wanted = "streaming_llm(sinks=4,window=60)"
    rows = model.run(loaded, tokenizer, wanted, others("unpatched,hf:static"), [300, 280], SETTINGS, tmp_path)
    assert state_of(loaded) is None
    names = ["dense", wanted, "unpatched", "hf:static"]
    assert [(row.length, row.method) for row in rows] == [(n, name) for n in (280, 300) for name in names]
    for row in rows:
        dense = next(base for base in rows if base.length == row.length and base.method == "dense")
        assert row.error is None
        assert row.dense_token_ms == dense.token_ms
        assert row.dense_prefill_s == dense.prefill_s
        assert row.ttft_s >= row.prefill_s > 0
        assert row.token_p10_ms <= row.token_ms <= row.token_p90_ms
        assert len(row.prefill_runs_s) == 2
        assert row.score == 0.0
        assert row.peak_bytes is None
    by_name = {row.method: row.kv_bytes for row in rows if row.length == 300}
    assert by_name["unpatched"] == A_TOKEN * (300 + NEW)
    assert by_name[wanted] < 0.5 * by_name["unpatched"]
    assert by_name["dense"] >= by_name["unpatched"]
    written = [json.loads(line) for line in (tmp_path / "bench_model.jsonl").read_text().splitlines()]
    assert [Row(**line) for line in written] == rows
    about = json.loads((tmp_path / "run_meta.json").read_text())["bench_model"]
    assert about["settings"]["prompts"] == "pass keys"
    assert about["settings"]["tokens"] == 3


def test_what_was_measured_is_not_measured_again(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = build(config, "auto", CPU)
    once = model.run(loaded, None, "quest", [], [64], SETTINGS, tmp_path)
    assert [row.score for row in once] == [None, None]
    asked = []
    monkeypatch.setattr(cost, "cost", lambda *args, real=cost.cost: asked.append(args[1].shape[1]) or real(*args))
    again = model.run(loaded, None, "quest", others("unpatched"), [64, 96], SETTINGS, tmp_path, resume=True)
    assert again[:2] == once
    assert asked == [64] * 2 + [96] * 6
    assert again[2].dense_token_ms == once[0].token_ms
    with pytest.raises(ValueError, match="made with runs=3"):
        model.run(loaded, None, "quest", [], [64], Settings(tokens=3, runs=3), tmp_path, resume=True)


def test_a_cell_without_memory_is_written_and_the_run_goes_on(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(loaded: Any, ids: torch.Tensor, tokens: int, extra: Any, real: Any = cost.cost) -> Any:
        if ids.shape[1] == 96 and state_of(loaded).plan.method == "dense":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(loaded, ids, tokens, extra)

    monkeypatch.setattr(cost, "cost", full)
    loaded = build(config, "auto", CPU)
    rows = model.run(loaded, None, "quest", [], [64, 96], SETTINGS, tmp_path)
    errors = {(row.method, row.length): row.error for row in rows}
    assert errors.pop(("dense", 96)) == "out of memory: CUDA out of memory. Tried to allocate 2 GiB"
    assert set(errors.values()) == {None}
    assert rows[3].dense_token_ms is None
    assert state_of(loaded) is None
    assert model.run(loaded, None, "quest", [], [64, 96], SETTINGS, tmp_path, resume=True) == rows


def test_a_peer_may_fail_and_a_method_may_not(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = build(config, "auto", CPU)
    broken = peers.Peer("broken", {"cache_implementation": "no such cache"})
    row = model.run(loaded, None, "dense", [broken], [64], SETTINGS, tmp_path)[1]
    assert row.token_ms is None
    assert str(row.error).startswith("ValueError: ")
    monkeypatch.setattr(cost, "warm", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.run(loaded, None, "dense", [], [65], SETTINGS, tmp_path / "other")
    assert state_of(loaded) is None


def test_keys_that_are_found_are_counted(
    tiny: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, tokenizer = tiny
    prompts = list(model._prompts(loaded, tokenizer, 290, Settings(tokens=3, runs=1, batch=2)))
    ((ids, keys),) = prompts
    assert ids.shape == (2, 290)
    assert keys[0] != keys[1]
    said = [tokenizer(f" {key} is it.", add_special_tokens=False)["input_ids"] for key in (keys[0], "12345")]
    said[1] += [0] * (len(said[0]) - len(said[1]))
    found = cost.Cost(1.0, 1.0, (1.0, 2.0), 8, 0, 16, None, None, torch.tensor(said)[:, : len(said[0])])
    monkeypatch.setattr(cost, "cost", lambda *args: found)
    (row,) = model.run(loaded, tokenizer, "dense", [], [290], Settings(tokens=3, runs=1, batch=2), tmp_path)
    assert row.score == 0.5
    assert row.kv_share == 0.5


def test_tensors_are_counted_once_whatever_holds_them() -> None:
    one = torch.zeros(10, dtype=torch.float64)

    class Holder:
        def __init__(self) -> None:
            self.parts = {"a": [one, one[:3]], "b": (torch.zeros(4, dtype=torch.uint8),)}
            self.layer = torch.nn.Linear(50, 50)

    assert held(Holder(), CPU) == (84, 0)
    assert len(list(reached(Holder()))) == 3


def test_peers_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    monkeypatch.delattr(peers.cache_utils, "Fp8QuantizedLayer", raising=False)
    found, absent = peers.choose("all", CPU)
    assert [peer.name for peer in found] == ["unpatched", "hf:static"]
    assert absent == [
        "hf:offloaded is absent: it needs CUDA.",
        "hf:fp8 is absent: it needs a later transformers, with Fp8QuantizedLayer.",
        "hf:hqq is absent: it needs hqq, which is not installed.",
        "hf:quanto is absent: it needs optimum.quanto, which is not installed.",
        "kvpress:snapkv is absent: it needs kvpress, which is not installed.",
    ]
    assert peers.choose("none", CPU) == ([], [])
    with pytest.raises(ValueError, match=r"--peers: expected all, none or some of unpatched, .*; got 'vllm'"):
        peers.choose("unpatched,vllm", CPU)


def test_a_peer_made_for_another_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_installed", lambda name: True)
    asked = ["torch<3", "transformers<5.3,>=4.56.0", 'transformers<5 ; extra == "old"']
    monkeypatch.setattr(peers, "requires", lambda name: asked)
    assert peers.choose("kvpress:snapkv", CPU) == (
        [],
        [f"kvpress:snapkv is absent: it needs transformers<5.3,>=4.56.0, not {transformers.__version__}."],
    )
    asked[1:2] = ["transformers>=4.56.0"]
    assert peers.choose("kvpress:snapkv", CPU) == ([peers.PEERS["kvpress:snapkv"]], [])


@pytest.mark.parametrize("name", ["hf:fp8", "hf:hqq", "hf:quanto"])
def test_quantized_caches_of_transformers_run(config: Path, tmp_path: Path, name: str) -> None:
    found, absent = peers.choose(name, CPU)
    if not found:
        pytest.skip(absent[0])
    plain, one = model.run(
        build(config, "auto", CPU), None, "dense", [*others("unpatched"), *found], [64], SETTINGS, tmp_path
    )[1:]
    assert one.error is None
    assert one.kv_bytes < 0.6 * plain.kv_bytes


def test_a_length_without_room_for_a_key_is_refused_before_anything_runs(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="passkey: expected a length of at least"):
        model.run(*tiny, "dense", [], [300, 20], SETTINGS, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("knobs", [{"tokens": 1}, {"runs": 0}, {"batch": 0}])
def test_settings_that_make_no_sense_are_refused(knobs: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"--{next(iter(knobs))}: expected at least"):
        Settings(**knobs)


@pytest.mark.parametrize(
    ("error", "yes"),
    [
        (MemoryError("no"), True),
        (torch.OutOfMemoryError("no"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("no"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_which_errors_are_of_memory(error: BaseException, yes: bool) -> None:
    assert cost.out_of_memory(error) is yes


def test_both_plots_show_every_method(tmp_path: Path) -> None:
    from matplotlib.image import imread

    def row(method: str, length: int, times: float) -> Row:
        value = length / 1024 * times
        more = {"kv_bytes": int(value * 2**20), "peak_bytes": int((1 + value) * 2**30)}
        return Row(method, length, 1, 8, ttft_s=value, token_ms=value, token_p10_ms=value, token_p90_ms=value, **more)

    def has(image: Any, colour: tuple[int, ...]) -> bool:
        return bool((abs(255 * image[:, :, :3] - colour) < 1).all(-1).any())

    rows = [row(name, n, times) for name, times in (("dense", 2), ("quest", 1)) for n in (1024, 2048)]
    rows.append(Row("dense", 4096, 1, 8, error="out of memory: much"))
    for draw in (show.plot_speed, show.plot_memory):
        draw(rows, tmp_path / "two.png", "two")
        draw(rows[:2], tmp_path / "one.png", "two")
        two, one = imread(tmp_path / "two.png"), imread(tmp_path / "one.png")
        assert two.shape[0] == one.shape[0]
        blue, orange = (31, 119, 180), (255, 127, 14)
        assert has(two, blue)
        assert has(two, orange)
        assert has(one, blue)
        assert not has(one, orange)


@pytest.mark.parametrize("random", [True, False])
def test_the_command(call: Any, folder: Path, config: Path, tmp_path: Path, random: bool) -> None:
    source = ("--random", "-m", str(config)) if random else ("-m", str(folder))
    sizes = ("--methods", "quest(token_budget=48)", "--lengths", "280,300", "--tokens", "2", "--runs", "1")
    code, out, err = call("bench", "model", *source, *sizes, "--device", "cpu", "-o", str(tmp_path / "o"))
    assert code == 0, err
    assert {path.name for path in (tmp_path / "o").iterdir()} == {
        "bench_model.jsonl", "bench_model_crossover.json", "run_meta.json", "bench_speed.png", "bench_memory.png",
    }  # fmt: skip
    assert len((tmp_path / "o" / "bench_model.jsonl").read_text().splitlines()) == 6
    found = json.loads((tmp_path / "o" / "bench_model_crossover.json").read_text())
    assert [one["method"] for one in found] == ["quest(token_budget=48)", "unpatched"]
    assert "quest(token_budget=48): decodes" in out
    assert "300 tokens" in out
    assert ("found" in out) is not random
    assert str(tmp_path) not in (tmp_path / "o" / "run_meta.json").read_text()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("model", "--methods", "qest"), "Did you mean 'quest'?"),
        (("model", "--lengths", "1q"), "tokens such as"),
        (("model", "--peers", "vllm"), "--peers: expected"),
        (("model", "--runs", "0"), "--runs: expected at least 1"),
        (("model", "--random", "-m", "nowhere.json"), "config of 'nowhere.json'"),
        (("op", "atend"), "bench op: expected some of attend"),
        (("op", "attend", "--dtype", "int8"), "--dtype: expected"),
    ],
)
def test_a_mistake_is_one_line(call: Any, tmp_path: Path, args: tuple[str, ...], said: str) -> None:
    code, _, err = call("bench", *args, "-o", str(tmp_path / "o"))
    assert code == 1
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "o").exists()
