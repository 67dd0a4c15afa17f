from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_longctx.evals.results import save_json
from hf_longctx.tune.thresholds import Thresholds, load_thresholds

FOUND = Thresholds("tiny", "llama", 8, 128, ((0.9, 0.5), (1.0, 0.1)), {"covered": 0.93})
RAW = FOUND.to_json()


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    save_json(tmp_path / "taus.json", RAW)
    again = load_thresholds(tmp_path / "taus.json")
    assert again == FOUND
    assert dict(again.meta) == {"covered": 0.93}
    assert again.to_json() == RAW
    again.check("llama", 2, 2, 8, 128)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "quest"}, "expected thresholds of 'xattention'; got those of 'quest'"),
        ({"tau": [[0.9, 0.5], [1.0, 0.0]]}, "layer 1, query head 1: expected a threshold in .0, 1.; got 0.0"),
        ({"tau": [[1.1, 0.5], [1.0, 0.1]]}, "layer 0, query head 0: expected a threshold in .0, 1.; got 1.1"),
        ({"tau": [[float("nan"), 0.5], [1.0, 0.1]]}, "layer 0, query head 0: expected a threshold in .0, 1.; got nan"),
        ({"tau": [[0.9, 0.5], [1.0]]}, "layer 1: expected 2 query heads, as in layer 0; got 1"),
        ({"tau": []}, "expected thresholds of at least one layer"),
        ({"tau": [["0.9", 0.5], [1.0, 0.1]]}, "'0.9' in place of a number"),
        ({"tau": [[True, 0.5], [1.0, 0.1]]}, "True in place of a number"),
        ({"tau": 0.9}, "expected a file of thresholds"),
        ({"layers": 3}, "expected 3 layers of 2 thresholds, as it says itself; got 2 of 2"),
        ({"q_heads": 4}, "expected 2 layers of 4 thresholds, as it says itself; got 2 of 2"),
        ({"stride": 8.0}, "8.0 in place of a whole number"),
        ({"meta": None}, "expected a file of thresholds"),
    ],
)
def test_a_file_that_cannot_be_is_refused_by_its_name(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    (tmp_path / "taus.json").write_text(json.dumps(RAW | change))
    with pytest.raises(ValueError, match=f"taus.json.*{words}"):
        load_thresholds(tmp_path / "taus.json")


@pytest.mark.parametrize("key", RAW)
def test_every_key_is_needed(tmp_path: Path, key: str) -> None:
    (tmp_path / "taus.json").write_text(json.dumps({k: v for k, v in RAW.items() if k != key}))
    with pytest.raises(ValueError, match=f"taus.json: expected a file of thresholds; got KeyError.'{key}'"):
        load_thresholds(tmp_path / "taus.json")


@pytest.mark.parametrize("content", [b"", b"layer\t0.9", b"\xff\xfe{", b"[0.9"])
def test_what_is_not_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "taus.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"taus\.json: expected JSON"):
        load_thresholds(tmp_path / "taus.json")


@pytest.mark.parametrize("content", ["[0.9]", "0.9", "null", '"xattention"'])
def test_other_json_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "taus.json").write_text(content)
    with pytest.raises(ValueError, match=r"taus\.json: expected a file of thresholds"):
        load_thresholds(tmp_path / "taus.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.json"):
        with pytest.raises(FileNotFoundError, match="expected a JSON file; got "):
            load_thresholds(path)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("qwen2", 2, 2, 8, 128), "for family 'qwen2'; got 'llama' .found on 'tiny'."),
        (("llama", 3, 2, 8, 128), "for layers 3; got 2"),
        (("llama", 2, 4, 8, 128), "for query heads 4; got 2"),
        (("llama", 2, 2, 16, 128), "for stride 16; got 8 .*Use stride=8, or find them anew"),
        (("llama", 2, 2, 8, 64), "for block 64; got 128 .*Use block=128, or find them anew"),
    ],
)
def test_another_model_is_refused(asked: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FOUND.check(*asked)
