"""A plugin for vLLM: pages chosen for each decode step, and QoQ checkpoints. vLLM calls `register` in each process."""

from __future__ import annotations

import logging
import os

from .settings import VARIABLE, PageChoice

TESTED = ("0.32",)
"""Releases of vLLM that the plugin was run with: beside others it steps aside."""


_log = logging.getLogger("vllm.hf_longctx")


def register() -> None:
    """Tell vLLM of what is here; may be called again. Attention stays vLLM's own unless `VARIABLE` is set.

    Raises:
        ValueError: the variable does not hold knobs of `PageChoice`.
    """
    import vllm

    if not vllm.__version__.startswith(tuple(f"{release}." for release in TESTED)):
        _log.warning("hf_longctx was tested with vLLM %s, not %s: not used.", ", ".join(TESTED), vllm.__version__)
        return
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.platforms import current_platform

    from .qoq import QoQ

    register_quantization_config("qoq")(QoQ)
    said = os.environ.get(VARIABLE)
    if said is None:
        return
    PageChoice.read(said)
    if not current_platform.is_cpu():
        _log.warning("%s: pages are chosen on the CPU platform only; attention stays vLLM's own.", VARIABLE)
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.attention.PageBackend")
