"""`from_pretrained` on the folder of a delta: its base is loaded, and the delta hangs on it as the one tenant."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...errors import UnsupportedError
from ..registry import announce
from .attach import install, state_of
from .checkpoint import Checkpoint, end_names
from .format import METHOD, VERSION, Delta, metadata, read
from .message import say
from .sources import base_folder

TENANT = "default"
"""The name of the one tenant."""


class BitDeltaConfig(QuantizationConfigMixin):
    """What `config.json` says of a delta.

    Args:
        base: hub id, or a folder, relative to that of the delta or from the root.
        revision: commit on the hub.
        base_digest: of all weights of the base.
        version: of the format.
    """

    def __init__(
        self,
        base: str | None = None,
        revision: str | None = None,
        base_digest: str | None = None,
        version: int = VERSION,
        **other: Any,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment] # transformers lists only its own
        self.base, self.revision, self.base_digest, self.version = base, revision, base_digest, version


class BitDeltaQuantizer(HfQuantizer):
    """Has the loader read the files of the base in place of the delta's, and hangs the delta on it afterwards."""

    quantization_config: BitDeltaConfig
    _delta: Delta

    @property
    def is_trainable(self) -> bool:
        """Its scales are trained by `hf-longctx delta compress --calibrate`, not by a Trainer."""
        return False

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """The delta alone is saved."""
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to make a delta of one checkpoint."""
        if not self.pre_quantized:
            advice = "A delta is made of two: hf-longctx delta compress --base BASE --finetuned FINETUNED -o out/"
            raise ValueError(say("from_pretrained", "the folder of a delta", "a model to compress", advice))

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes."""
        delta = state_of(model).tenants[TENANT]
        tensors = delta.tensors()
        return tensors, metadata(tensors, delta.base.checksums)

    def take_shapes(self, model: Any, source: Path) -> None:
        """Hang the delta of a folder on its base as shapes alone: both are on `meta`, nothing is compared.

        Raises:
            FileNotFoundError: no folder of a delta, or its base is not there.
            ValueError: the delta is damaged, or does not fit the model.
            UnsupportedError: the base is quantized, or something differs that cannot differ between rows.
        """
        folder = source if source.is_dir() else source.parent
        self._process_model_before_weight_loading(model, checkpoint_files=[str(folder / "config.json")])
        base = replace(self._delta.base, checksums={})
        install(model, {TENANT: replace(self._delta, base=base)}, 1)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        files: list[str] = kwargs["checkpoint_files"]
        folder = Path(files[0]).parent
        self._delta = delta = read(folder)
        base = Checkpoint.open(*base_folder(delta.base, folder))
        if getattr(base.config, "quantization_config", None) is not None:
            advice = "Load it with from_pretrained, then hf_longctx.deltas.load(model, {name: folder})"
            raise UnsupportedError(say(str(folder), "a base in 16 or 32 bits", "a quantized one", advice))
        if base.revision is None:
            self.quantization_config.base = str(base.folder)
        _take_shapes(model, base)
        files[:] = sorted({str(path) for path in base.files.values()})

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        install(model, {TENANT: self._delta}, 1).active = TENANT
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        model.merge_delta(TENANT)
        return model if dtype is None else model.to(dtype)


def _take_shapes(model: Any, base: Checkpoint) -> None:
    """Give embeddings and head of a model on the meta device the base's sizes, and its tie."""
    tied = bool(base.config.tie_word_embeddings)
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    for name, module in zip(end_names(model), (first, last), strict=True):
        if name in base.files:
            with safe_open(base.files[name], "pt") as file:
                shape = file.get_slice(name).get_shape()
            module.weight = nn.Parameter(torch.empty(shape, dtype=module.weight.dtype, device="meta"))
    if last is not None and tied:
        last.weight = first.weight
    if tied != model.config.tie_word_embeddings:
        theirs, model.config.tie_word_embeddings = model.config.tie_word_embeddings, tied
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        model.config.tie_word_embeddings = theirs


announce()  # again: the tables were filled while this file was only half there, if it was imported first
