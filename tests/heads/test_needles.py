"""Needles are where the prompt says they are, and refused where they are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_longctx.evals import text
from hf_longctx.evals.haystack import Haystack
from hf_longctx.heads.needles import Needle, hide, load_needles

NEEDLE = Needle(
    "The goat of Larkholm eats nine blue hats.", "What does the goat eat?", "nine blue hats", "The goat eats"
)
CHAT = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}you: {% endif %}"
)


@pytest.fixture
def tokenizer(tiny: tuple[Any, Any]) -> Any:
    tiny[1].chat_template = CHAT
    return tiny[1]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_the_span_is_the_answer_and_the_prompt_as_long_as_asked(tokenizer: Any, chat: bool, depth: float) -> None:
    hay = Haystack(tokenizer, text.shipped()[:20_000])
    for seed in range(5):
        hidden = hide(tokenizer, hay, NEEDLE, 300, depth, chat, seed)
        ids = hidden.ids.tolist()
        assert 295 <= len(ids) <= 300
        low, high = hidden.span
        assert tokenizer.decode(ids[low:high]).strip(" .") == "nine blue hats"
        assert tokenizer.decode(ids[:low]).endswith("The goat of Larkholm eats")
        whole = tokenizer.decode(ids)
        assert whole.startswith("<s>user: " if chat else "<s>" if tokenizer.bos_token_id in ids[:1] else "")
        assert whole.endswith("The goat eats")
        assert abs(low - depth * 300) < 90
        again = hide(tokenizer, hay, NEEDLE, 300, depth, chat, seed)
        assert again.ids.equal(hidden.ids)


def test_every_shipped_needle_is_found(tokenizer: Any) -> None:
    hay = Haystack(tokenizer, text.shipped()[:20_000])
    needles = load_needles()
    assert len(needles) >= 10
    for needle in needles:
        hidden = hide(tokenizer, hay, needle, 400, 0.5, False, 0)
        assert tokenizer.decode(hidden.answer_ids).strip(" .") == needle.answer
        assert needle.start


def test_the_published_form_is_read(tmp_path: Path) -> None:
    line = {"needle": "It is a cat on a mat.", "question": "What is it?", "real_needle": "a cat on a mat."}
    (tmp_path / "n.jsonl").write_text(json.dumps(line) + "\n\n")
    assert load_needles(tmp_path / "n.jsonl") == [Needle("It is a cat on a mat.", "What is it?", "a cat on a mat")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "n.jsonl: expected at least one needle"),
        ("{", "n.jsonl, line 1: expected a needle"),
        ('{"needle": "a", "question": "b"}', "line 1: expected a needle; got KeyError"),
        (
            '{"needle": "a b", "question": "b", "real_needle": "c"}',
            "line 1: expected real_needle once in needle; got 'c'",
        ),
        ('{"needle": "a b b", "question": "b", "real_needle": "b"}', "expected real_needle once in needle"),
        ('{"needle": "a", "question": "b", "real_needle": 3}', "line 1: expected a needle; got AttributeError"),
    ],
)
def test_a_bad_file_of_needles_is_refused(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "n.jsonl").write_text(content)
    with pytest.raises(ValueError, match=said):
        load_needles(tmp_path / "n.jsonl")


def test_a_needle_that_the_prompt_does_not_show_is_refused(tokenizer: Any) -> None:
    hay = Haystack(tokenizer, text.shipped()[:20_000])
    tokenizer.chat_template = CHAT.replace("| trim", "| upper")
    with pytest.raises(ValueError, match=r"needle 3: expected .* once in the tokenized prompt; got 0"):
        hide(tokenizer, hay, NEEDLE, 300, 0.5, True, 0, "needle 3")
    twice = Haystack(tokenizer, f"It rained. {NEEDLE.needle} " * 20)
    with pytest.raises(ValueError, match=r"once in the tokenized prompt; got [2-9]"):
        hide(tokenizer, twice, NEEDLE, 300, 0.5, False, 0)


def test_a_length_without_room_and_a_tokenizer_without_places_are_refused(tokenizer: Any) -> None:
    hay = Haystack(tokenizer, text.shipped()[:20_000])
    with pytest.raises(ValueError, match="expected a length with room for some text; got 40 tokens"):
        hide(tokenizer, hay, NEEDLE, 40, 0.5, False, 0)

    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="tokenizer: expected a fast one, with offsets; got Slow"):
        hide(Slow(), hay, NEEDLE, 300, 0.5, False, 0)
