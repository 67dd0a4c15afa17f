"""What is told of scores and gates."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from hf_longctx.heads import HeadPattern, show
from hf_longctx.heads.detect import Row, score
from hf_longctx.heads.scores import HeadScores, load_scores

PATTERN = HeadPattern("gates", ((0.9, 0.1), (0.3, 0.2)))


def row(trial: int, recall: float, **paper: int) -> Row:
    counts = {f"0-{name[1:]}": count for name, count in paper.items()}
    return Row(100, 0.5, trial, 0, "b", 99, (10, 14), "b", recall, counts, counts, {f"0-{h}": 0.25 for h in range(3)})


def test_a_detection_is_told_with_what_its_halves_say(tmp_path: Path) -> None:
    rows = [row(0, 1, h0=1, h1=2), row(1, 1, h0=2, h1=4), row(2, 1, h0=1, h1=4), row(3, 0.2, h2=4)]
    console = Console(record=True, width=120, file=io.StringIO())
    show.publish(rows, score(rows, [3], "paper", "model"), "paper", [1], {"text": "x"}, tmp_path / "s.json", console)
    said = " ".join(console.export_text().split())
    assert "model: 3 query heads, 3 trials, 2 at 0.1 or more and 1 at 0.5 or more" in said
    assert "3 of 4 trials kept; Spearman of halves 1.000 over 3 heads" in said
    assert load_scores(tmp_path / "s.json").trials[0, 1] == (0.5, 1.0, 1.0)
    told = json.loads((tmp_path / "s_summary.json").read_text())
    assert told["cells"] == [{"length": 100, "depth": 0.5, "kept": 3, "trials": 4}]
    assert told["heads"][0] == {
        "head": "0-0",
        "mean": pytest.approx(1 / 3),
        "low": pytest.approx(1 / 3 - 1.96 * 0.25 / 3),
        "high": pytest.approx(1 / 3 + 1.96 * 0.25 / 3),
        "active": 1.0,
        "top_share": 0.25,
    }


def test_two_files_agree_as_far_as_their_ranks_do() -> None:
    query = HeadScores({(n, h): (0.1 * n + 0.2 * h,) for n in range(2) for h in range(4)}, "query")
    assert show.agreement(query, query, 3).startswith(
        "query and query: Spearman 1.000 over 8 query heads, 3 of the top 3"
    )
    # the largest of each pair: 0.2, 0.6, 0.3, 0.7 against 0.9, 0.1, 0.3, 0.2: ranks differ by 3, 2, 1, 2
    for first, second in ((query, PATTERN), (PATTERN, query)):
        assert "Spearman -0.800 over 4 KV heads, 2 of the top 3 in common" in show.agreement(first, second, 3)


def test_a_source_is_what_its_name_says(tmp_path: Path) -> None:
    assert isinstance(show.read("Llama-2-7B-32K-Instruct"), HeadPattern)
    (tmp_path / "full_attention_heads.tsv").write_text("0.5\t0.25\n")
    for source in (tmp_path, tmp_path / "full_attention_heads.tsv"):
        assert show.values(show.read(str(source))) == {(0, 0): 0.5, (0, 1): 0.25}
    (tmp_path / "s.json").write_text('{"0-0": [1.0]}')
    assert show.values(show.read(str(tmp_path / "s.json"))) == {(0, 0): 1.0}


def test_numbers_of_heads_come_from_the_user_or_the_summary(tmp_path: Path) -> None:
    source = str(tmp_path / "s.json")
    assert show.heads_of(source, None, 5, "kv_heads") == 5
    with pytest.raises(ValueError, match="expected --kv-heads or --model; got neither"):
        show.heads_of(source, None, None, "kv_heads")
    (tmp_path / "s_summary.json").write_text('{"kv_heads": [3, 3]}')
    assert show.heads_of(source, None, None, "kv_heads") == 3
