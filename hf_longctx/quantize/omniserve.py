"""From the published files of a QServe model to a folder that `from_pretrained` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch

from ..weights.qoq import omniserve
from ..weights.qoq.linear import QoQLinear
from ..weights.qoq.quantizer import chosen_linears, declare


def found(folder: Path) -> bool:
    """Whether a folder is such a model: `pytorch_model.bin` with quantized layers. A stale index beside it is none."""
    file = folder / omniserve.FILE
    return is_zipfile(file) and omniserve.config_of(omniserve.open_file(file)) is not None


def read(folder: Path) -> tuple[Any, Any]:
    """The model and its tokenizer, None where there is not one.

    Raises:
        ValueError: tensors that are missing, too many, of other shapes, or not those of a folded model; names them.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tensors = omniserve.open_file(folder / omniserve.FILE)
    config = omniserve.config_of(tensors)
    assert config is not None
    about = AutoConfig.from_pretrained(folder)
    about.tie_word_embeddings = "lm_head.weight" not in tensors
    with torch.device("meta"):
        factory: Any = AutoModelForCausalLM
        model = factory.from_config(about, dtype=torch.float16).eval()
    for name in chosen_linears(model, config):
        old = model.get_submodule(name)
        bias = f"{name}.bias" in tensors
        model.set_submodule(name, QoQLinear(old.in_features, old.out_features, bias, config, "meta", torch.float16))
    state = omniserve.converted(tensors, config)
    del tensors
    _fill(model, state)
    declare(model, config)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    return model, AutoTokenizer.from_pretrained(folder) if has_tokenizer else None


def _fill(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Put tensors into a model without any; norms that the file leaves out are ones."""
    expected = model.state_dict()
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    for name, x in expected.items():
        if "norm" in name and name not in state:
            state[name] = torch.ones(x.shape, dtype=torch.float16)
    missing, extra = sorted(expected.keys() - state.keys() - tied), sorted(state.keys() - expected.keys())
    other = [name for name in sorted(expected.keys() & state.keys()) if expected[name].shape != state[name].shape]
    for names, what in ((missing, "are missing"), (extra, "are too many"), (other, "have another shape")):
        if names:
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise ValueError(
                f"omniserve checkpoint: expected the tensors of '{model.config.model_type}' as config.json has it; got "
                f"some that {what}: {shown}. Take both files of one model."
            )
    model.load_state_dict(state, assign=True, strict=False)
    model.tie_weights()
