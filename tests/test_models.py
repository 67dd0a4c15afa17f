"""Facts that are read from a configuration."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import hf_longctx as lc
from hf_longctx.models import inspect_model

from .integration.cases import BY_NAME, WINDOW
from .methods.cases import gates
from .methods.test_limits import TOLERANCE, error

PHI = BY_NAME["phi3_wide_window"]
POSITIONS = 256  # of every tiny model


def phi(window: int | None) -> hf.PreTrainedModel:
    """Phi-3 with this window; the weights are the same for every window."""
    model = PHI.make()
    model.config.sliding_window = window
    return model


@pytest.mark.parametrize(
    ("window", "expected"),
    [(None, None), (WINDOW, WINDOW), (POSITIONS - 1, POSITIONS - 1), (POSITIONS, None), (2 * POSITIONS, None)],
)
def test_a_window_of_all_positions_is_none(window: int | None, expected: int | None) -> None:
    assert {layer.window for layer in inspect_model(phi(window)).layers} == {expected}


@pytest.mark.parametrize("method", [lc.StreamingLLM(), lc.DuoAttention(pattern=gates(PHI))])
def test_only_a_window_that_bounds_memory_is_left_as_it_is(method: lc.StreamingLLM | lc.DuoAttention) -> None:
    lc.patch(phi(POSITIONS), method)
    with pytest.raises(lc.UnsupportedError, match=f"with a sliding window of {POSITIONS - 1} in all 2 layers"):
        lc.patch(phi(POSITIONS - 1), method)


@torch.no_grad()
def test_beyond_its_positions_a_wide_window_is_full_attention() -> None:
    ids = PHI.prompt(POSITIONS + 40)
    got = lc.patch(phi(POSITIONS), "dense")(ids).logits
    assert error(got, phi(None)(ids).logits) < TOLERANCE
    assert error(got, phi(POSITIONS)(ids).logits) > TOLERANCE
