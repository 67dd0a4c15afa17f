"""The definition of every operation, in plain torch; takes every argument on every device."""

from __future__ import annotations

from ..dispatch import Implementation
from .append import append, append_pages
from .attend import attend_blocks, attend_pages
from .count import count_blocks
from .delta import delta_linear, linear_with_delta, linears_with_delta
from .experts import combine_experts, sort_experts, w4a8_experts
from .fill import fill_pages
from .heads import attend_heads
from .host import bring_blocks, copy_blocks
from .kv import decode_kv, encode_kv
from .linear import quantize_gated, quantize_norm, quantize_tokens, w4a8_linear, w4a8_linears, w4a8_linears_of
from .norm import rms_norm
from .pick import pick_blocks
from .project import gated, project, project_gated
from .recent import attend_recent, step_recent
from .rotate import rotate, rotate_heads
from .score import score_antidiagonal, score_pages
from .selected import attend_mass
from .step import attend_layer
from .tables import linear_of_rows

OPS = {
    "attend_blocks": Implementation(attend_blocks),
    "attend_heads": Implementation(attend_heads),
    "attend_pages": Implementation(attend_pages),
    "attend_mass": Implementation(attend_mass),
    "attend_recent": Implementation(attend_recent),
    "step_recent": Implementation(step_recent),
    "attend_layer": Implementation(attend_layer),
    "score_pages": Implementation(score_pages),
    "score_antidiagonal": Implementation(score_antidiagonal),
    "pick_blocks": Implementation(pick_blocks),
    "count_blocks": Implementation(count_blocks),
    "rotate": Implementation(rotate),
    "rotate_heads": Implementation(rotate_heads),
    "rms_norm": Implementation(rms_norm),
    "gated": Implementation(gated),
    "project": Implementation(project),
    "project_gated": Implementation(project_gated),
    "append": Implementation(append),
    "append_pages": Implementation(append_pages),
    "fill_pages": Implementation(fill_pages),
    "bring_blocks": Implementation(bring_blocks),
    "copy_blocks": Implementation(copy_blocks),
    "encode_kv": Implementation(encode_kv),
    "decode_kv": Implementation(decode_kv),
    "delta_linear": Implementation(delta_linear),
    "linear_with_delta": Implementation(linear_with_delta),
    "linears_with_delta": Implementation(linears_with_delta),
    "linear_of_rows": Implementation(linear_of_rows),
    "quantize_tokens": Implementation(quantize_tokens),
    "quantize_norm": Implementation(quantize_norm),
    "quantize_gated": Implementation(quantize_gated),
    "w4a8_linear": Implementation(w4a8_linear),
    "w4a8_linears": Implementation(w4a8_linears),
    "w4a8_linears_of": Implementation(w4a8_linears_of),
    "sort_experts": Implementation(sort_experts),
    "w4a8_experts": Implementation(w4a8_experts),
    "combine_experts": Implementation(combine_experts),
}
