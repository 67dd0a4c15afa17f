"""A processor of Qwen2.5-VL without torchvision, for frames that have the size which the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .vision import CHATML, tiny_tokenizer


class Pixels:
    """What `Qwen2_5_VLProcessor` does, but for resizing: words to tokens, frames to patches, a mark for each.

    Args:
        patch: sides of a patch, in pixels.
    """

    merge, pair = 2, 2
    """Patches that become one token, along each side; frames that become one."""

    def __init__(self, patch: int = 14) -> None:
        self.patch, self.tokenizer, self.chat_template = patch, tiny_tokenizer(), CHATML
        self.video_processor = SimpleNamespace(temporal_patch_size=self.pair)

    def apply_chat_template(self, messages: list[Any], **options: Any) -> str:
        """As the tokenizer's."""
        return str(self.tokenizer.apply_chat_template(messages, **{"chat_template": self.chat_template, **options}))

    def __call__(
        self, text: Sequence[str], videos: Sequence[Sequence[Tensor]], video_metadata: Any, **options: Any
    ) -> dict[str, Any]:
        """Words and frames of several rows; each has one video, `[T, 3, H, W]`, uint8."""
        patches, grids = zip(*(self._patches(video) for row in videos for video in row), strict=True)
        mark = "<|video_pad|>"
        words = [
            row.replace(mark, mark * (grid.prod().item() // self.merge**2))
            for row, grid in zip(text, grids, strict=True)
        ]
        out = dict(
            self.tokenizer(words, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
        )
        out["mm_token_type_ids"] = 2 * (out["input_ids"] == self.tokenizer.convert_tokens_to_ids(mark))
        out["pixel_values_videos"], out["video_grid_thw"] = torch.cat(patches), torch.stack(grids)
        out["second_per_grid_ts"] = torch.tensor([self.pair / row[0]["fps"] for row in video_metadata])
        return out

    def _patches(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """`[t * h * w, 3 * pair * patch * patch]`, windows of `merge * merge` patches together; and `t, h, w`."""
        frames, channels, height, width = video.shape
        scaled = (video.float() / 255 - 0.45) / 0.27
        t, h, w = frames // self.pair, height // self.patch, width // self.patch
        grid = scaled.view(
            t, self.pair, channels, h // self.merge, self.merge, self.patch, w // self.merge, self.merge, self.patch
        )
        flat = grid.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1)
        return flat, torch.tensor([t, h, w])
