"""The published files of QServe models, as omniserve reads them: one pickle of tensors, in an order of its own.

Names are those of transformers with q, k, v and gate, up apart. Of a 4-bit layer there are `qweight` `[N, K / 2]` int8,
`s1_scales` `[N]`, and either `s1_szeros` `[N]`, zero times scale, or, with groups of 128, `s2_scales` and `s2_zeros`
`[K / 128, N]` int8, the latter minus zero times scale, modulo 256; of an 8-bit one `weight` `[N, K]` int8 and
`dequant_scale` `[N]`. Nothing says which but the names.

Row `32a + 16b + 8c + d` and column `32e + 16f + 4g + h` of 4-bit codes are nibble b (0: the low one) of byte
`((a * K / 32 + e) * 32 + 4d + g) * 16 + 8f + 4c + h`; row `8i + j` of each 32 has its group scales in place `4j + i`.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from ...kernels.linear import Codes
from ...kernels.packing import pack
from .config import QoQConfig
from .linear import parts_of

FILE = "pytorch_model.bin"
_GROUP = 128
_LAYERS = ("qweight", "s1_scales", "s1_szeros", "s2_scales", "s2_zeros", "dequant_scale")
SKIPPED = ("rotary_emb.inv_freq", "kv_scale_quant_orig")
"""Ends of names that nothing here reads: what follows from the configuration, and scales of a cache of theirs."""


def open_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name; nothing in it is run.

    Raises:
        ValueError: it holds anything but tensors, or is damaged.
    """
    advice = "Download it again, or from another place"
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        what = str(error).splitlines()[0]
        raise ValueError(f"{path.name}: expected a file of tensors alone; got {what} {advice}.") from error
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) for x in found.values()):
        raise ValueError(f"{path.name}: expected tensors by name; got {type(found).__name__} of others. {advice}.")
    return dict(found)


def config_of(tensors: dict[str, Tensor]) -> QoQConfig | None:
    """Bits and groups of a file; None if it is no quantized one."""
    kinds = {name.rpartition(".")[2] for name in tensors}
    if "qweight" in kinds:
        return QoQConfig(4, _GROUP if "s2_scales" in kinds else -1)
    return QoQConfig(8) if "dequant_scale" in kinds else None


def sorted_out(tensors: dict[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The parts of each quantized layer by its name, and all else that is read."""
    layers: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for name, x in tensors.items():
        prefix, _, last = name.rpartition(".")
        if last in _LAYERS or (last == "weight" and x.dtype == torch.int8):
            layers.setdefault(prefix, {})[last] = x
        elif not name.endswith(SKIPPED):
            rest[name] = x
    return layers, rest


def parts_in(config: QoQConfig) -> tuple[str, ...]:
    """What a quantized layer has in a file of such bits and groups; the first is its weight."""
    if config.kind == "w8":
        return "weight", "dequant_scale"
    return ("qweight", "s1_scales", *(("s1_szeros",) if config.kind == "channel" else ("s2_scales", "s2_zeros")))


def check_layer(name: str, parts: dict[str, Tensor], config: QoQConfig, rows: int, columns: int) -> None:
    """Refuse a layer that is not one of `rows` outputs and `columns` inputs.

    Raises:
        ValueError: a tensor that is not there, of another shape or dtype, or one that another kind of file has.
    """
    unit = 1 if config.kind == "w8" else 32
    if rows % unit or columns % unit:
        raise _refused(f"{name}.qweight", "rows and columns in multiples of 32", f"{rows} and {columns}")
    groups = (columns // _GROUP, rows)
    shapes = {"weight": (rows, columns), "qweight": (rows, columns // 2), "s2_scales": groups, "s2_zeros": groups}
    for part in parts_in(config):
        x, full, shape = parts.get(part), f"{name}.{part}", shapes.get(part, (rows,))
        dtype = torch.int8 if part in shapes else None
        if x is None:
            raise _refused(full, "a tensor", "none")
        if x.shape != shape or not (x.dtype == dtype if dtype else x.is_floating_point()):
            raise _refused(full, f"{dtype or 'floating point'} {list(shape)}", f"{x.dtype} {list(x.shape)}")
    other = sorted(set(parts) - set(parts_in(config)))
    if other:
        raise _refused(f"{name}.{other[0]}", "nothing of that name beside the others", "it")


def check_norm(name: str, x: Tensor) -> None:
    """Refuse a norm that is not ones: its factors should have gone into the weights (ValueError)."""
    if "norm" in name.rpartition(".")[0].rpartition(".")[2] and name.endswith("weight") and not bool(x.eq(1).all()):
        worst = float(x.float().sub(1).abs().max())
        raise _refused(name, "ones, as norms are part of the weights", f"{worst:.3g} away from it")


def repacked(parts: dict[str, Tensor], config: QoQConfig) -> dict[str, Tensor]:
    """The tensors of a `QoQLinear`, of a layer that was checked."""
    if config.kind == "w8":
        codes = Codes(parts["weight"].contiguous(), parts["dequant_scale"].float())
    else:
        codes = _nibbles(parts, config)
    return parts_of(pack(codes))


def _nibbles(parts: dict[str, Tensor], config: QoQConfig) -> Codes:
    values, scale = unpack_nibbles(parts["qweight"]), parts["s1_scales"].float()
    if config.kind == "channel":
        return Codes(values, scale, parts["s1_szeros"].float())
    steps, zeros = (unpermute(parts[name]).T.contiguous() for name in ("s2_scales", "s2_zeros"))
    # A zero that went round 256 comes back by counting codes from the lowest there is.
    groups = values.view(len(values), -1, _GROUP)
    low = groups.amin(2) * (zeros > 0)
    zeros = zeros + low.to(torch.int8) * steps
    return Codes((groups - low[..., None]).view(values.shape), scale, None, steps, zeros)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Codes `[N, K]` uint8 of `qweight` `[N, K / 2]`."""
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    stored = packed.contiguous().view(torch.uint8).view(rows // 32, columns // 32, 8, 4, 2, 2, 4)  # a e d g f c h
    both = torch.stack((stored & 15, stored >> 4))  # b a e d g f c h
    return both.permute(1, 0, 6, 3, 2, 5, 4, 7).reshape(rows, columns)


def unpermute(stored: Tensor) -> Tensor:
    """Group scales or zeros `[G, N]` in the natural order of rows."""
    return stored.view(len(stored), -1, 8, 4).transpose(2, 3).reshape(stored.shape)


def _refused(name: str, expected: str, got: str) -> ValueError:
    return ValueError(f"omniserve checkpoint: expected {expected} in {name}; got {got}. Download or make it again.")
