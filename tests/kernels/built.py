"""Whether the compiled library can be tested here."""

from __future__ import annotations

import pytest
import torch

from hf_longctx.kernels.compiled import library


def need(device: str | torch.device) -> None:
    """Skip where nothing was built; a library that is there and does not serve the device is a failure."""
    if not library.path().exists():
        pytest.skip(str(library.reason(torch.device(device))))
    assert library.reason(torch.device(device)) is None
