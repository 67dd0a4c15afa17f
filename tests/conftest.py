"""One thread: tiny models only lose time by sharing their work out."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
