"""What a model's own chat template puts around turns, and what its own processor makes of their words and pictures."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..models import VisionFacts

_WORD = "ok"


@dataclass(frozen=True)
class Turn:
    """A user's turn: words, and the pictures of a round.

    Args:
        text: the words.
        pictures: `[H, W, 3]`, uint8, all of one size; empty for words alone.
        times: seconds of the stream at which they were taken.
        round_s: seconds that they stand for.
    """

    text: str
    pictures: Sequence[Tensor] = ()
    times: Sequence[float] = ()
    round_s: float = 1.0

    @property
    def fps(self) -> float:
        """Pictures a second, by their times."""
        if len(self.times) < 2 or self.times[-1] <= self.times[0]:
            return 1.0 / self.round_s
        return round((len(self.times) - 1) / (self.times[-1] - self.times[0]), 3)

    def at_least(self, pictures: int) -> Turn:
        """The same with its last picture repeated until there are so many: some families read no fewer."""
        more = max(0, pictures - len(self.pictures))
        repeated = [*self.pictures, *[self.pictures[-1]] * more], [*self.times, *[self.times[-1]] * more]
        return replace(self, pictures=repeated[0], times=repeated[1]) if more else self


@dataclass(frozen=True)
class Encoded:
    """Turns of several rows, as the model takes them.

    Args:
        ids: of each row.
        kinds: of each row, 0 for text, 1 for an image, 2 for video; None where positions have one number.
        vision: what the vision tower reads, of all rows together.
    """

    ids: list[list[int]]
    kinds: list[list[int]] | None
    vision: Mapping[str, Any] = field(default_factory=dict)


class Chat:
    """The turns of a conversation, one after the other, without the ones before.

    Args:
        model: the vision-language model, to know which inputs it takes.
        processor: its own, with a chat template.
        facts: how the family takes pictures.

    Raises:
        UnsupportedError: the template does more than to add turns.

    Attributes:
        prompt: tokens that ask for an answer.
        closing: tokens that end an answer.
    """

    def __init__(self, model: Any, processor: Any, facts: VisionFacts) -> None:
        self._processor, self._facts = processor, facts
        self._device = model.get_input_embeddings().weight.device
        self._takes = set(inspect.signature(type(model).forward).parameters)
        user, answer = _message("user", _WORD), _message("assistant", _WORD)
        self._before = [user, answer]
        self._rendered: tuple[Any, str] = None, ""
        asked = self._added([user], prompt=True)
        whole = self._render(self._before)
        ends = whole.rfind(_WORD)
        if ends < 0:
            raise self._odd("leaves answers out")
        self.prompt, self.closing = self._tokens(asked), self._tokens(whole[ends + len(_WORD) :])

    def opening(self, system: str | None, query: str) -> list[int]:
        """Tokens of the conversation's beginning: the system's words and the user's wish."""
        first = [] if system is None else [_message("system", system)]
        return self._tokens(self._render([*first, _message("user", query)]))

    def encode(self, turns: Sequence[Turn | None]) -> Encoded:
        """Turns as they follow an answer; None for a row that has none."""
        seen = [turn for turn in turns if turn is not None and turn.pictures]
        made = self._with_pictures(seen) if seen else {}
        types, pictured = made.get("mm_token_type_ids"), iter(range(len(seen)))
        ids: list[list[int]] = []
        kinds: list[list[int]] = []
        for turn in turns:
            if turn is not None and turn.pictures:
                row = next(pictured)
                real = made["attention_mask"][row].bool()
                ids.append(made["input_ids"][row][real].tolist())
                kinds.append([0] * len(ids[-1]) if types is None else types[row][real].tolist())
            else:
                ids.append([] if turn is None else self._tokens(self._added([*self._before, _user(turn)])))
                kinds.append([0] * len(ids[-1]))
        vision = {name: x for name, x in made.items() if name in self._takes - _OF_TEXT}
        return Encoded(ids, kinds if self._facts.axes == 3 else None, vision)

    def decode(self, ids: Sequence[int]) -> str:
        """Words of an answer."""
        return str(self._processor.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _with_pictures(self, turns: Sequence[Turn]) -> dict[str, Any]:
        kind = self._facts.pictures
        if kind == "video":
            turns = [
                turn.at_least(getattr(self._processor.video_processor, "temporal_patch_size", 1)) for turn in turns
            ]
        texts = [self._added([*self._before, _user(turn, kind)]) for turn in turns]
        more: dict[str, Any] = {"return_mm_token_type_ids": True} if self._facts.axes == 3 else {}
        pictures = [[picture.permute(2, 0, 1) for picture in turn.pictures] for turn in turns]
        if kind == "image":
            more["images"] = pictures
        else:
            more["videos"] = [[torch.stack([one.to(self._device) for one in row])] for row in pictures]
            more["do_sample_frames"] = False
            more["video_metadata"] = [[_metadata(turn)] for turn in turns]
        out = self._processor(text=texts, padding=True, add_special_tokens=False, return_tensors="pt", **more)
        return dict(out)

    def _added(self, messages: Sequence[dict[str, Any]], prompt: bool = False) -> str:
        """What the template adds for the last message, or for the wish for an answer to it."""
        before = self._render(messages) if prompt else self._known(messages[:-1])
        after = self._render(messages, prompt)
        if not after.startswith(before) or after == before:
            raise self._odd("does not simply add a turn to those before it")
        return after[len(before) :]

    def _known(self, messages: Sequence[dict[str, Any]]) -> str:
        """As `_render`; of what is before a turn, which is the same each time as long as the template is."""
        key = list(messages), getattr(self._processor, "chat_template", None)
        if self._rendered[0] != key:
            self._rendered = key, self._render(messages)
        return self._rendered[1]

    def _render(self, messages: Sequence[dict[str, Any]], prompt: bool = False) -> str:
        template = getattr(self._processor, "chat_template", None)
        own = {"chat_template": template} if isinstance(template, str) else {}  # SmolVLM else takes another for video
        chat = self._processor.apply_chat_template
        return str(chat(list(messages), tokenize=False, add_generation_prompt=prompt, **own))

    def _tokens(self, text: str) -> list[int]:
        return list(self._processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _odd(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"stream.Session: expected a chat template to which turns can be added; got that of "
            f"{type(self._processor).__name__}, which {what}. Set processor.chat_template to a plain one."
        )


_OF_TEXT = {"input_ids", "attention_mask", "mm_token_type_ids", "position_ids"}


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _user(turn: Turn, kind: str = "video") -> dict[str, Any]:
    pictures = [{"type": kind}] * (0 if not turn.pictures else 1 if kind == "video" else len(turn.pictures))
    words = [{"type": "text", "text": turn.text}] if turn.text else []
    return {"role": "user", "content": [*words, *pictures]}


def _metadata(turn: Turn) -> dict[str, Any]:
    """What the processor may want to know of a round: its rate, and where in the stream its pictures stand."""
    height, width = turn.pictures[0].shape[:2]
    return {
        "total_num_frames": len(turn.pictures),
        "fps": turn.fps,
        "width": width,
        "height": height,
        "duration": len(turn.pictures) / turn.fps,
        "video_backend": "frames",
        "frames_indices": [round(t * turn.fps) for t in turn.times],
    }
