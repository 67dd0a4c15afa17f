"""Models from their configuration alone: on the `meta` device for their shapes, or with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .evals import assets

_ADVICE = "Give a folder, a hub id, a config.json or a .gguf file."


def read_config(source: str | Path | None) -> Any:
    """The configuration of a model, of which nothing else is read.

    Args:
        source: a hub id, a folder, a `config.json` or a `.gguf` file; None is SmolLM2-135M-Instruct, fetched if
            need be.

    Raises:
        AssetError: there is no such configuration, or transformers does not know it.
    """
    from transformers import AutoConfig

    here = assets.fetch() if source is None else Path(source).expanduser()
    place: str | Path = here if here.exists() else str(source)
    kwargs: dict[str, Any] = {}
    if here.suffix in (".json", ".gguf") and not here.is_file():
        raise assets.AssetError(f"config of '{source}': expected a file; there is none. {_ADVICE}")
    if here.is_file() and here.suffix == ".gguf":
        place, kwargs["gguf_file"] = here.parent, here.name
    try:
        return AutoConfig.from_pretrained(place, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        said = " ".join(str(error).split())
        raise assets.AssetError(
            f"config of '{source}': expected a model's configuration; got {said} {_ADVICE}"
        ) from error


def build(source: str | Path | None, dtype: str, device: torch.device, seed: int = 0) -> Any:
    """A causal language model of a configuration, in evaluation mode; weights are random, or on `meta` none at all.

    Args:
        source: as in `read_config`.
        dtype: `auto` (what the configuration says, float32 if nothing), `float32`, `bfloat16` or `float16`.
        device: where it is made; nothing is copied there.
        seed: of the weights.

    Raises:
        AssetError: as `read_config`, or no class for it can write text.
        ValueError: an unknown dtype; quantized weights that are to be random, or of a kind whose shapes only they tell.
        FileNotFoundError: a delta whose base is not there.
    """
    if dtype not in assets.DTYPES:
        raise ValueError(f"dtype: expected {', '.join(assets.DTYPES[:-1])} or {assets.DTYPES[-1]}; got '{dtype}'.")
    config = read_config(source)
    quantized = None if str(source).endswith(".gguf") else getattr(config, "quantization_config", None)
    if quantized is not None:
        _require_known(quantized, source, device)
    made = torch.float32 if config.dtype is None else config.dtype
    made = made if dtype == "auto" else getattr(torch, dtype)
    config._name_or_path = _name(source)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        with torch.device(device):
            model = _class_of(config, source).from_config(config, dtype=made)
    if quantized is not None:
        _replace_weights(model, quantized, Path(str(source)).expanduser())
    return model.eval()


def _require_known(quantized: Any, source: str | Path | None, device: torch.device) -> None:
    """Refuse quantized weights but those of this package on `meta`, before anything is made."""
    from .weights.registry import METHODS

    method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized.quant_method
    if device.type != "meta":
        expected, advice = "weights that can be drawn at random", "Give the base model's config"
    elif method not in METHODS:
        expected, advice = "weights as the configuration has them", "Load the model and use hf_longctx.plan(model)"
    else:
        return
    raise ValueError(f"config of '{source}': expected {expected}; got quantized ones ({method}). {advice}.")


def _replace_weights(model: Any, quantized: Any, source: Path) -> None:
    """Give a model on `meta` the tensors that the checkpoint of this configuration has, by shape."""
    from transformers.quantizers.auto import AutoHfQuantizer

    AutoHfQuantizer.from_config(quantized, pre_quantized=True).take_shapes(model, source)


def _class_of(config: Any, source: str | Path | None) -> Any:
    """The auto class that makes a model of a configuration which writes text."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise assets.AssetError(
        f"config of '{source}': expected a model that writes text; got one of type '{config.model_type}'. {_ADVICE}"
    )


def _name(source: str | Path | None) -> str:
    """What a model is called that was made of a configuration: its file's name says more than `config.json`."""
    here = Path(str(source))
    if source is not None and here.suffix == ".json":
        return here.stem if here.stem != "config" else here.expanduser().resolve().parent.name
    return assets.display_name(source)
