"""The processor without torchvision gives what the family's own gives for frames that need no resize."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("torchvision")  # of the processor that it is compared with; the extra `video` brings it

from hf_longctx.testing.pixels import Pixels
from hf_longctx.testing.vision import tiny_qwen2_5_vl


def test_it_gives_what_the_familys_own_processor_gives() -> None:
    _, own = tiny_qwen2_5_vl()
    plain = Pixels()
    made = torch.Generator().manual_seed(0)
    videos = [[torch.randint(0, 256, (2, 3, 56, 84), dtype=torch.uint8, generator=made)] for _ in range(2)]
    mark = "<|vision_start|><|video_pad|><|vision_end|>"
    text = [f"{mark}Go on.", f"Time {mark}"]
    about = [[{"total_num_frames": 2, "fps": 2.0, "frames_indices": [0, 1]}] for _ in videos]
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    expected = own(text=text, videos=videos, video_metadata=about, do_sample_frames=False, **options)
    got = plain(text=text, videos=videos, video_metadata=about)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "video_grid_thw"):
        assert torch.equal(got[name], expected[name].to(got[name].dtype)), name
    assert got["second_per_grid_ts"].tolist() == list(expected["second_per_grid_ts"])
    ours, theirs = got["pixel_values_videos"], expected["pixel_values_videos"]
    for channel in range(3):  # each has a mean and a spread of its own there
        a, b = (x.view(len(x), 3, -1)[:, channel].flatten() for x in (ours, theirs))
        slope = float(torch.cov(torch.stack((a, b)))[0, 1] / a.var())
        torch.testing.assert_close(slope * (a - a.mean()) + b.mean(), b, rtol=0, atol=1e-4)
