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
_SKIPPED = ("rotary_emb.inv_freq", "kv_scale_quant_orig")


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


def converted(tensors: dict[str, Tensor], config: QoQConfig) -> dict[str, Tensor]:
    """The same weights by the names and in the order of `QoQLinear`; all else as it is.

    Raises:
        ValueError: a layer that lacks a tensor, has one of another shape or dtype, or one that another kind of file
            has; or a norm that is not ones, whose factors should have gone into the weights. It is named.
    """
    out: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        prefix, _, last = name.rpartition(".")
        if last in _LAYERS or (last == "weight" and x.dtype == torch.int8):
            layers.setdefault(prefix, {})[last] = x
        elif not name.endswith(_SKIPPED):
            if "norm" in prefix.rpartition(".")[2] and last == "weight" and not bool(x.eq(1).all()):
                worst = float(x.float().sub(1).abs().max())
                raise _refused(name, "ones, as norms are part of the weights", f"{worst:.3g} away from it")
            out[name] = x
    for prefix, parts in layers.items():
        codes = _bytes(prefix, parts) if config.wbits == 8 else _nibbles(prefix, parts, config)
        try:
            packed = parts_of(pack(codes))
        except ValueError as error:
            raise ValueError(f"{prefix}: {error}") from error
        out.update({f"{prefix}.{name}": x for name, x in packed.items()})
    return out


def _bytes(prefix: str, parts: dict[str, Tensor]) -> Codes:
    weight = _take(prefix, parts, "weight", torch.int8, None)
    scale = _take(prefix, parts, "dequant_scale", None, (len(weight),))
    _nothing_else(prefix, parts, ("weight", "dequant_scale"))
    return Codes(weight.contiguous(), scale.float())


def _nibbles(prefix: str, parts: dict[str, Tensor], config: QoQConfig) -> Codes:
    packed = _take(prefix, parts, "qweight", torch.int8, None)
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    if rows % 32 or columns % 32:
        raise _refused(f"{prefix}.qweight", "rows and columns in multiples of 32", f"{rows} and {columns}")
    values, scale = unpack_nibbles(packed), _take(prefix, parts, "s1_scales", None, (rows,)).float()
    if config.group_size != _GROUP:
        shift = _take(prefix, parts, "s1_szeros", None, (rows,)).float()
        _nothing_else(prefix, parts, ("qweight", "s1_scales", "s1_szeros"))
        return Codes(values, scale, shift)
    shape = (columns // _GROUP, rows)
    steps, zeros = (
        unpermute(_take(prefix, parts, name, torch.int8, shape)).T.contiguous() for name in ("s2_scales", "s2_zeros")
    )
    _nothing_else(prefix, parts, ("qweight", "s1_scales", "s2_scales", "s2_zeros"))
    # A zero that went round 256 comes back by counting codes from the lowest there is.
    groups = values.view(rows, -1, _GROUP)
    low = groups.amin(2) * (zeros > 0)
    zeros = zeros + low.to(torch.int8) * steps
    return Codes((groups - low[..., None]).view(rows, columns), scale, None, steps, zeros)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Codes `[N, K]` uint8 of `qweight` `[N, K / 2]`."""
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    stored = packed.contiguous().view(torch.uint8).view(rows // 32, columns // 32, 8, 4, 2, 2, 4)  # a e d g f c h
    both = torch.stack((stored & 15, stored >> 4))  # b a e d g f c h
    return both.permute(1, 0, 6, 3, 2, 5, 4, 7).reshape(rows, columns)


def unpermute(stored: Tensor) -> Tensor:
    """Group scales or zeros `[G, N]` in the natural order of rows."""
    return stored.view(len(stored), -1, 8, 4).transpose(2, 3).reshape(stored.shape)


def _take(
    prefix: str, parts: dict[str, Tensor], name: str, dtype: torch.dtype | None, shape: tuple[int, ...] | None
) -> Tensor:
    x, full = parts.get(name), f"{prefix}.{name}"
    if x is None:
        raise _refused(full, "a tensor", "none")
    fits = (x.ndim == 2 if shape is None else x.shape == shape) and (
        x.dtype == dtype if dtype else x.is_floating_point()
    )
    if not fits:
        wanted = f"{dtype or 'floating point'} {'[N, ..]' if shape is None else list(shape)}"
        raise _refused(full, wanted, f"{x.dtype} {list(x.shape)}")
    return x


def _nothing_else(prefix: str, parts: dict[str, Tensor], known: tuple[str, ...]) -> None:
    other = sorted(set(parts) - set(known))
    if other:
        raise _refused(f"{prefix}.{other[0]}", "nothing of that name beside the others", "it")


def _refused(name: str, expected: str, got: str) -> ValueError:
    return ValueError(f"omniserve checkpoint: expected {expected} in {name}; got {got}. Download or make it again.")
