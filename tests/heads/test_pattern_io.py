"""Head patterns: the seven published ones, round trips, checks against a model, choice of heads, bad files."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_longctx import heads
from hf_longctx.heads import pattern_io

SHAPES = {
    "Llama-2-7B-32K-Instruct": (32, 32, 0.434),
    "Llama-3-8B-Instruct-Gradient-1048k": (32, 8, 0.809),
    "Llama-3-8B-Instruct-Gradient-4194k": (32, 8, 0.812),
    "Meta-Llama-3.1-8B-Instruct": (32, 8, 0.914),
    "Mistral-7B-Instruct-v0.2": (32, 8, 0.953),
    "Mistral-7B-Instruct-v0.3": (32, 8, 0.938),
    "Mixtral-8x7B-Instruct-v0.1": (32, 8, 0.742),
}


def folder_with(tmp_path: Path, gates: str | bytes, config: str | None = None) -> Path:
    path = tmp_path / "pattern"
    path.mkdir(exist_ok=True)
    (path / pattern_io.GATES_FILE).write_bytes(gates.encode() if isinstance(gates, str) else gates)
    if config is not None:
        (path / pattern_io.CONFIG_FILE).write_text(config)
    return path


# the shipped patterns


def test_seven_published_patterns_are_shipped_and_one_of_our_own() -> None:
    assert heads.available_patterns() == (*sorted(SHAPES), "SmolLM2-135M-Instruct")


@pytest.mark.parametrize("name", SHAPES)
def test_shipped_pattern_has_its_published_shape(name: str) -> None:
    layers, kv_heads, above_half = SHAPES[name]
    pattern = heads.load_pattern(name)
    heads.check_pattern(pattern, layers, kv_heads)
    assert (pattern.name, pattern.sink, pattern.window) == (name, 128, 256)
    gates = [gate for row in pattern.gates for gate in row]
    assert min(gates) >= 0
    assert max(gates) <= 1
    assert sum(gate > 0.5 for gate in gates) / len(gates) == pytest.approx(above_half, abs=5e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_every_pattern_has_a_licence(name: str) -> None:
    folder = Path(pattern_io.__file__).parent / "patterns"
    line = next(line for line in (folder / "LICENSES.md").read_text().splitlines() if f"| {name} |" in line)
    licence = line.split("`")[1]
    assert ("Apache License" if name.startswith("Mixtral") else "MIT License") in (folder / licence).read_text()


@pytest.mark.parametrize(
    "alias",
    ["mistralai/Mistral-7B-Instruct-v0.2", "mistral-7b-instruct-V0.2", "models/Mistral-7B-Instruct-v0.2/"],
)
def test_name_is_found_with_or_without_organisation_and_case(alias: str) -> None:
    assert heads.load_pattern(alias).name == "Mistral-7B-Instruct-v0.2"


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"got 'Mistral-7B-Instruct-v0\.9'\. Did you mean 'Mistral-7B-Instruct-v0"):
        heads.load_pattern("Mistral-7B-Instruct-v0.9")
    with pytest.raises(ValueError, match="Shipped are Llama-2-7B-32K-Instruct"):
        heads.load_pattern("zzz")


# reading and writing


@pytest.mark.parametrize("name", SHAPES)
def test_round_trip_is_bit_exact(name: str, tmp_path: Path) -> None:
    pattern = heads.load_pattern(name)
    heads.save_pattern(pattern, tmp_path / "a" / "b")
    assert heads.load_pattern(tmp_path / "a" / "b") == pattern
    shipped = Path(pattern_io.__file__).parent / "patterns" / name / pattern_io.GATES_FILE
    written = (tmp_path / "a" / "b" / pattern_io.GATES_FILE).read_text().split()
    assert all(new == old or old.startswith("-") for new, old in zip(written, shipped.read_text().split(), strict=True))


@given(gates=st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=4))
def test_any_gates_survive_a_round_trip(gates: list[list[float]], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("pattern")
    pattern = heads.load_pattern(gates)
    heads.save_pattern(pattern, folder)
    assert heads.load_pattern(folder).gates == pattern.gates
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "full_attention_heads.tsv"]


def test_failed_save_leaves_the_old_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = heads.load_pattern([[0.25, 0.5]])
    heads.save_pattern(old, tmp_path)

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        heads.save_pattern(heads.load_pattern([[1.0, 1.0]]), tmp_path)
    assert heads.load_pattern(tmp_path).gates == old.gates
    assert len(list(tmp_path.iterdir())) == 2


def test_unequal_layers_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"equally many KV heads per layer; got \[1, 2\]"):
        heads.save_pattern(heads.load_pattern([[1.0], [1.0, 0.0]]), tmp_path)


def test_folder_file_parent_and_gates_read_alike(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "1\t0.25\n0\t-0.001\n", '{"model_name": "models/Mine", "sink_size": 4}')
    pattern = heads.load_pattern(folder)
    assert (pattern.name, pattern.sink, pattern.window) == ("Mine", 4, 256)
    assert pattern.gates == ((1.0, 0.25), (0.0, 0.0)) == heads.load_pattern([[1, 0.25], [0, 1e-9 * 0]]).gates
    for source in (str(folder), folder / pattern_io.GATES_FILE, tmp_path, pattern):
        assert heads.load_pattern(source) == pattern


def test_folder_above_several_patterns_is_ambiguous(tmp_path: Path) -> None:
    for name in ("a", "b"):
        heads.save_pattern(heads.load_pattern([[1.0]]), tmp_path / name)
    with pytest.raises(ValueError, match=r"expected one pattern; got 2 \(a, b\)"):
        heads.load_pattern(tmp_path)


def test_model_folder_without_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "Mistral-7B-Instruct-v0.3").mkdir()
    assert heads.load_pattern(tmp_path / "Mistral-7B-Instruct-v0.3").name == "Mistral-7B-Instruct-v0.3"
    with pytest.raises(FileNotFoundError, match=r"a folder with full_attention_heads\.tsv"):
        heads.load_pattern(tmp_path)


def test_missing_configuration_means_the_published_sizes(tmp_path: Path) -> None:
    pattern = heads.load_pattern(folder_with(tmp_path, "1\t0\n"))
    assert (pattern.name, pattern.sink, pattern.window) == ("pattern", 128, 256)


def test_deployment_sizes_win(tmp_path: Path) -> None:
    facts = {"sink_size": 128, "recent_size": 256, "deploy_sink_size": 64, "deploy_recent_size": None}
    pattern = heads.load_pattern(folder_with(tmp_path, "1\t0\n", json.dumps(facts)))
    assert (pattern.sink, pattern.window) == (64, 256)


def test_trailing_blank_lines_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    assert heads.load_pattern(folder_with(tmp_path, "1\t0\r\n0\t1\r\n\r\n")).gates == ((1.0, 0.0), (0.0, 1.0))


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ("", "got an empty file"),
        ("\n\n", "got an empty file"),
        ("1\t0\n1\n", r"tsv, line 2: expected 2 columns, as in line 1; got 1"),
        ("1\t0\n\n1\t0\n", r"tsv, line 2, column 1: expected a number; got ''"),
        ("1\t0\n1\tnan\n", r"tsv, line 2, column 2: expected a finite gate; got nan"),
        ("inf\t0\n", r"line 1, column 1: expected a finite gate; got inf"),
        ("head0\thead1\n1\t0\n", r"line 1, column 1: expected a number; got 'head0'"),
        ("1 0\n", r"line 1, column 1: expected a number; got '1 0'"),
        ("1\t1.06\n", r"line 1, column 2: expected a gate in \[0, 1\] \(up to 0.05 beyond\); got 1.06"),
        ("-0.2\t1\n", r"line 1, column 1: expected a gate in \[0, 1\]"),
        (b"\xff\xfe\x00\x80", "expected tab separated numbers; got a binary file"),
    ],
)
def test_bad_gates_are_refused_by_file_and_line(gates: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        heads.load_pattern(folder_with(tmp_path, gates))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", r"config\.json: expected a JSON object; got Expecting"),
        ("[1]", r"config\.json: expected a JSON object; got list"),
        ('{"sink_size": -1}', r"sink_size: expected a whole number of at least 0 tokens; got -1"),
        ('{"recent_size": 0}', r"recent_size: expected a whole number of at least 1 tokens; got 0"),
        ('{"recent_size": "256"}', r"recent_size: expected a whole number of at least 1 tokens; got '256'"),
        ('{"deploy_sink_size": 1.5}', r"deploy_sink_size: expected a whole number"),
        ('{"sink_size": true}', r"sink_size: expected a whole number .*; got True"),
    ],
)
def test_bad_configuration_is_refused(config: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        heads.load_pattern(folder_with(tmp_path, "1\t0\n", config))


def test_a_pickle_is_never_executed(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    with pytest.raises(ValueError, match="expected"):
        heads.load_pattern(folder_with(tmp_path, pickle.dumps(Trap())))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("source", [3, None, [1.0, 2.0], [["a"]], {"a": 1}])
def test_other_types_are_refused(source: Any) -> None:
    with pytest.raises(TypeError, match=r"^(pattern|gates): expected"):
        heads.load_pattern(source)


@pytest.mark.parametrize("gates", [[], [[]], [[1.0], []], [[2.0]], [[float("nan")]]])
def test_bad_gates_in_memory_are_refused(gates: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="expected"):
        heads.load_pattern(gates)
    with pytest.raises(ValueError, match="expected"):
        heads.HeadPattern("direct", tuple(map(tuple, gates)))


# checking against a model


def test_check_names_file_layer_and_numbers() -> None:
    pattern = heads.load_pattern("Mistral-7B-Instruct-v0.2")
    with pytest.raises(
        ValueError, match=r"v0\.2/full_attention_heads\.tsv: expected 24 layers \(lines\); got 32\. Use"
    ):
        heads.check_pattern(pattern, 24, 8)
    with pytest.raises(ValueError, match=r"tsv, layer 0 \(line 1\): expected 4 KV heads \(columns\); got 8\. Use"):
        heads.check_pattern(pattern, 32, 4)
    with pytest.raises(ValueError, match=r"layer 5 \(line 6\): expected 2 KV heads"):
        heads.check_pattern(pattern, 32, [8] * 5 + [2] + [8] * 26)
    with pytest.raises(ValueError, match="kv_heads: expected one number for each of 32 layers; got 31"):
        heads.check_pattern(pattern, 32, [8] * 31)
    heads.check_pattern(heads.load_pattern([[1.0], [1.0, 0.0]]), 2, [1, 2])


# choosing heads


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("sparsity", [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1])
def test_realised_share_is_exact(name: str, sparsity: float) -> None:
    pattern = heads.load_pattern(name)
    chosen = heads.retrieval_heads(pattern, sparsity)
    total = sum(map(len, pattern.gates))
    assert sum(map(sum, chosen)) == round((1 - sparsity) * total)
    assert [len(row) for row in chosen] == [len(row) for row in pattern.gates]


@given(
    gates=st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=4), min_size=1, max_size=4),
    sparsity=st.floats(0, 1),
)
def test_chosen_heads_have_the_largest_gates_and_ties_go_to_the_first(
    gates: list[list[float]], sparsity: float
) -> None:
    pattern = heads.load_pattern(gates)
    chosen = heads.retrieval_heads(pattern, sparsity)
    flat = [
        (gate, flag) for row, flags in zip(gates, chosen, strict=True) for gate, flag in zip(row, flags, strict=True)
    ]
    dropped: list[float] = []
    for gate, flag in flat:
        assert not flag or gate not in dropped  # once a head of this gate streams, no later one of the same gate stays
        dropped += [] if flag else [gate]
    assert max(dropped, default=0.0) <= min((gate for gate, flag in flat if flag), default=1.0)
    assert chosen == heads.retrieval_heads(pattern, sparsity)


def test_limits_of_sparsity() -> None:
    pattern = heads.load_pattern([[1.0, 1.0], [1.0, 0.0]])
    assert heads.retrieval_heads(pattern, 0) == ((True, True), (True, True))
    assert heads.retrieval_heads(pattern, 0.5) == ((True, True), (False, False))
    assert heads.retrieval_heads(pattern, 1) == ((False, False), (False, False))
    for sparsity in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"sparsity: expected a share in \[0, 1\]"):
            heads.retrieval_heads(pattern, sparsity)
