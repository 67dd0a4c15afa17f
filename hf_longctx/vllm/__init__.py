"""A plugin for vLLM: decode steps that read few blocks, and QoQ checkpoints. vLLM calls `register` in each process."""

from __future__ import annotations

import logging
import os

from .settings import asked

TESTED = ("0.32",)
"""Releases of vLLM that the plugin was run with: beside others it steps aside."""


_log = logging.getLogger("vllm.hf_longctx")


def register() -> None:
    """Tell vLLM of what is here; may be called again. Attention stays vLLM's own unless `settings.asked`.

    Raises:
        ValueError: the variable does not hold knobs, or both are set.
    """
    import vllm

    if not vllm.__version__.startswith(tuple(f"{release}." for release in TESTED)):
        _log.warning("hf_longctx was tested with vLLM %s, not %s: not used.", ", ".join(TESTED), vllm.__version__)
        return
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.platforms import current_platform

    from .qoq import QoQ

    register_quantization_config("qoq")(QoQ)
    choice = asked(os.environ)
    if choice is None:
        return
    if not current_platform.is_cpu():
        _log.warning("%s: pages are chosen on the CPU platform only; attention stays vLLM's own.", choice.variable)
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.attention.PageBackend")
