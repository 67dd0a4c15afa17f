from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_longctx.evals import grammar

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(alphabet="abcNone-_/.,() 019", max_size=12),
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dense", [("dense", "dense", {})]),
        (" Dense , streaming-llm ", [("dense", "dense", {}), ("streaming_llm", "streaming_llm", {})]),
        (
            "dense,streaming_llm( window = 508, sinks=4 )",
            [
                ("dense", "dense", {}),
                ("streaming_llm(sinks=4,window=508)", "streaming_llm", {"sinks": 4, "window": 508}),
            ],
        ),
        ("streaming_llm()", [("streaming_llm", "streaming_llm", {})]),
        (
            "duo_attention(sparsity=0.25),duo_attention(pattern='a, (b)',sinks=None)",
            [
                ("duo_attention(sparsity=0.25)", "duo_attention", {"sparsity": 0.25}),
                ("duo_attention(pattern='a, (b)',sinks=None)", "duo_attention", {"pattern": "a, (b)", "sinks": None}),
            ],
        ),
        (
            "duo_attention(pattern=some/folder)",
            [("duo_attention(pattern=some/folder)", "duo_attention", {"pattern": "some/folder"})],
        ),
    ],
)
def test_methods_are_read_with_their_knobs(text: str, expected: list[tuple[Any, ...]]) -> None:
    assert [(choice.name, choice.method, choice.knobs) for choice in grammar.methods(text)] == expected


@given(pattern=VALUES)
def test_a_name_is_a_text_that_reads_as_the_same_choice(pattern: Any) -> None:
    shown = grammar._shown(pattern)
    choice = grammar.methods(f"duo_attention(pattern={shown})")[0]
    assert choice.knobs == {"pattern": pattern}
    assert type(choice.knobs["pattern"]) is type(pattern)
    assert grammar.methods(choice.name) == [choice]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected name or name"),
        ("dense,", "expected name or name"),
        ("dense,,dense", "expected name or name"),
        ("dense streaming_llm", "got 'dense streaming_llm'"),
        ("streaming_llm(sinks=4", r"got 'streaming_llm\(sinks=4'"),
        ("streaming_llm(sinks)", r"streaming_llm\(knob=value, ...\); got 'sinks'"),
        ("streaming_llm(sinks=)", "got 'sinks='"),
        ("streaming_llm(sinks=1,sinks=2)", "'sinks' twice"),
        ("streming_llm", "Did you mean 'streaming_llm'"),
        ("streaming_llm(windw=4)", "Did you mean 'window'"),
        ("streaming_llm(sinks=-1)", "-1"),
        ("dense,dense", "'dense' twice"),
        ("streaming_llm(sinks=4,window=9),streaming_llm(window=9,sinks=4)", "twice"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        grammar.methods(text)


def test_lengths() -> None:
    assert grammar.lengths("1k, 2K,300,1m") == [1024, 2048, 300, 1 << 20]


@pytest.mark.parametrize("text", ["", "1g", "k", "0", "-1", "1.5k", "1k,", "1k,1024"])
def test_lengths_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="lengths: expected"):
        grammar.lengths(text)
