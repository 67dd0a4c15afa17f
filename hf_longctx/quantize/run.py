"""A whole quantization: layer after layer, in the memory of the model and one layer, and resumable."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..evals import text as texts
from ..evals.results import meta
from ..evals.runner import bar, model_name
from ..weights.qoq.calibrate.apart import put_back, put_together, take_apart
from ..weights.qoq.calibrate.blocks import Block, block_of, layers_of
from ..weights.qoq.calibrate.flow import Call, Inputs, calls, embed
from ..weights.qoq.calibrate.hadamard import rotation
from ..weights.qoq.calibrate.layer import quantize_layer
from ..weights.qoq.calibrate.recipe import Recipe
from ..weights.qoq.calibrate.transforms import gain, set_gain
from ..weights.qoq.chosen import chosen_experts, chosen_linears, is_known
from ..weights.qoq.config import QoQConfig
from ..weights.qoq.experts import FUSED, UP, QoQExperts, put, rounded
from ..weights.qoq.grids import nearest_grid
from ..weights.qoq.linear import QoQLinear
from ..weights.qoq.quantizer import declare
from .saving import finished, load_layer, save_layer

_MOST_SAMPLES = 128


@dataclass(frozen=True)
class Task:
    """What is read, and how.

    Attributes:
        samples: texts.
        seqlen: tokens of each.
        batch: texts that run together.
        text: name of the file.
        text_sha256: of its content.
    """

    samples: int
    seqlen: int
    batch: int
    text: str
    text_sha256: str


def samples(tokenizer: Any, content: str, count: int | None, seqlen: int) -> Tensor:
    """Texts to calibrate on: stretches of one text, evenly apart, `[S, T]` int64.

    Args:
        tokenizer: of the model; each stretch begins with its begin-of-sequence token, if it has one.
        content: the text.
        count: how many; None: 128, or what the text has.
        seqlen: tokens of each.

    Raises:
        ValueError: the text is shorter than asked for, or fewer than one text of two tokens is.
    """
    if seqlen < 2 or (count is not None and count < 1):
        raise ValueError(f"quantize: expected texts of 2 tokens or more; got {count} of {seqlen}. Ask for more.")
    opening, ids = texts.opening_ids(tokenizer), texts.token_ids(tokenizer, content)
    length = seqlen - len(opening)
    there = len(ids) // length
    wanted = min(there, _MOST_SAMPLES) if count is None else count
    if wanted > there or wanted < 1:
        raise ValueError(
            f"quantize: expected a text of {max(wanted, 1)} x {length:,} tokens; got {len(ids):,}. "
            "Pass a longer --calib, fewer --samples or a shorter --seqlen."
        )
    gap = (len(ids) - length) / max(wanted - 1, 1)
    starts = [round(i * gap) for i in range(wanted)]
    return torch.tensor([opening + ids[start : start + length] for start in starts])


def run(
    model: Any, ids: Tensor, recipe: Recipe, task: Task, out: Path, device: Any, resume: bool, console: Console | None
) -> dict[str, Any]:
    """Quantize a loaded model in place; it is then like one that `from_pretrained` has read.

    Args:
        model: a causal language model in floating point; it stays where it is, a layer at a time goes to `device`.
        ids: `[S, T]` int64, texts.
        recipe: the steps.
        task: about the texts.
        out: folder; finished layers are kept in it, for a run that goes on.
        device: to work on.
        resume: go on from finished layers.
        console: where the bar goes.

    Returns:
        The report: `meta`, and for each layer the errors of its linear layers and of its output.

    Raises:
        ValueError: a layer that does not fit, texts that do not, or layers of other settings.
        UnsupportedError: a family that is built otherwise; says which part. Nothing was written to `out`.
        RuntimeError: inputs that are not finite.
    """
    blocks = _blocks(model, recipe)
    about = {"model": model_name(model), **recipe.about, **asdict(task)}
    work = finished(out, resume)
    with torch.no_grad():
        layers = layers_of(model)[1]
        arguments = calls(model, layers, ids[:1])
        hidden = embed(model, layers, ids, task.batch)
        turn = _turn(model, recipe, hidden, ids[: task.batch], layers)
        if turn is not None:
            hidden = [x @ turn for x in hidden]
        reports = []
        with bar(console) as shown:
            steps = shown.add_task("layers", total=len(blocks), said="")
            for index, name in enumerate(blocks):
                path, layer = work / f"layer-{index:03d}.safetensors", layers[index]
                if path.exists():
                    report = _restore(layer, path, recipe, about)
                else:
                    report = _make(model, layer, name, arguments[index], hidden, recipe, turn, device)
                    save_layer(path, layer, report, about)
                hidden = _advance(layer, arguments[index], hidden, device, model.dtype)
                reports.append(report)
                shown.update(steps, completed=index + 1, said=f"error {report['output']:.3f}")
        if turn is not None:
            _turn_head(model, hidden[0][:1], turn)
    declare(model, recipe.config)
    return {"meta": meta(torch.device(device), about), "layers": reports}


@torch.no_grad()
def round_all(model: Any, config: QoQConfig) -> None:
    """Round the weights of a loaded model to the nearest, in place.

    Raises:
        ValueError: a layer that does not fit.
        UnsupportedError: experts of a form that is not known.
    """
    for name in chosen_linears(model, config):
        linear = model.get_submodule(name)
        grid = nearest_grid(linear.weight, config)
        model.set_submodule(name, QoQLinear.of(linear, grid, grid.codes(linear.weight), config))
    for name in chosen_experts(model, config):
        old = model.get_submodule(name)
        made = QoQExperts(old, config)
        for part, own in FUSED.items():
            put(getattr(made, own), rounded(getattr(old, part), config))
        model.set_submodule(name, made)
    declare(model, config)


def _blocks(model: Any, recipe: Recipe) -> list[str]:
    """Names of the layers, all of which can be quantized."""
    if getattr(model, "is_quantized", False):
        advice = "Start from the checkpoint in floating point"
        raise ValueError(f"quantize: expected weights in floating point; got a quantized model. {advice}.")
    prefix, layers = layers_of(model)
    names = [f"{prefix}.{index}" for index in range(len(layers))]
    parts = [_checked(model, layer, name) for layer, name in zip(layers, names, strict=True)]
    if recipe.rotate:
        for block in parts:
            for norm, _ in block.readers:
                gain(norm, block.o.out_features)
    chosen_linears(model, recipe.config)
    return names


def _block(model: Any, layer: nn.Module, name: str) -> Block:
    """Its parts; experts are to be apart."""
    return block_of(layer, name, model.get_decoder().config)


def _checked(model: Any, layer: nn.Module, name: str) -> Block:
    """The same, of a layer that stays as it is."""
    take_apart(layer)
    try:
        return _block(model, layer, name)
    finally:
        put_back(layer)


def _make(
    model: Any,
    layer: nn.Module,
    name: str,
    call: Call,
    hidden: Inputs,
    recipe: Recipe,
    turn: Tensor | None,
    device: Any,
) -> dict[str, Any]:
    """Quantize one layer, in float32 on the device; it comes back in the model's dtype."""
    home, dtype = next(layer.parameters()).device, model.dtype
    layer.to(device, torch.float32)
    take_apart(layer)
    block = _block(model, layer, name)
    there = None if turn is None else turn.to(device)
    report = quantize_layer(block, call, hidden, recipe, there, _rotary(model, block.head_dim))
    del block  # of which the float32 weights are
    put_together(layer, recipe.config)
    layer.to(home, dtype)
    return report.about


def _restore(layer: nn.Module, path: Path, recipe: Recipe, about: dict[str, Any]) -> dict[str, Any]:
    """Put a finished layer in its place."""
    tensors, report = load_layer(path, about)
    for name, linear in list(layer.named_modules()):
        if is_known(linear) and f"{name}.{UP}.weight" in tensors:
            layer.set_submodule(name, QoQExperts(linear, recipe.config))
        elif isinstance(linear, nn.Linear) and f"{name}.weight_scale" in tensors:
            bias = linear.bias is not None
            layer.set_submodule(name, QoQLinear(linear.in_features, linear.out_features, bias, recipe.config, "meta"))
    layer.load_state_dict(tensors, assign=True)
    return report


def _advance(layer: nn.Module, call: Call, hidden: Inputs, device: Any, dtype: torch.dtype) -> Inputs:
    """What the quantized layer gives, in float32; it comes back in `dtype`."""
    home = next(layer.parameters()).device
    layer.to(device, torch.float32)
    after = [call(layer, x.to(device)).cpu() for x in hidden]
    layer.to(home, dtype)
    return after


def _rotary(model: Any, head_dim: int) -> int:
    """Channels of a head that positions rotate."""
    config = model.get_decoder().config
    rope = getattr(config, "rope_parameters", None) or {}
    share = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    return int(head_dim * share) if rope else 0


def _turn(model: Any, recipe: Recipe, hidden: Inputs, ids: Tensor, layers: nn.ModuleList) -> Tensor | None:
    """The rotation `[H, H]`, after the embedding has been turned by it."""
    if not recipe.rotate:
        return None
    source = model.get_input_embeddings()
    head = model.get_output_embeddings()
    if head is not None and head.weight is source.weight:
        head.weight = nn.Parameter(head.weight.clone())
        model.config.tie_word_embeddings = False
        model.config.get_text_config().tie_word_embeddings = False
    turn = rotation(source.weight.shape[1], recipe.seed)
    kept = source.weight.clone()
    source.weight.copy_(source.weight.double() @ turn.to(source.weight.device))
    turn = turn.float()
    apart = embed(model, layers, ids, len(ids))[0] - hidden[0] @ turn
    if float(apart.norm() / hidden[0].norm()) > (1e-4 if kept.dtype == torch.float32 else 2e-2):
        raise UnsupportedError(
            f"quantize: expected the residual stream of '{model.config.model_type}' to be its token embeddings; got "
            "something added to them. Pass --no-rotate."
        )
    return turn


def _turn_head(model: Any, hidden: Tensor, turn: Tensor) -> None:
    """Have the last norm and the output embedding read the turned residual stream."""
    norm, head = model.get_decoder().norm, model.get_output_embeddings()
    factors = gain(norm, len(turn))
    place = head.weight.device
    head.weight.copy_((head.weight.float() * factors.to(place)) @ turn.to(place))
    set_gain(norm, torch.ones_like(factors))


def table(report: dict[str, Any]) -> Table:
    """Errors of linear layers, by kind, root mean square over layers; and what each step made of them."""
    shown = Table(title="Relative error of outputs, all layers", title_justify="left")
    columns = ("nearest", "eased", "clipped", "kept")
    for name in ("layer", "to the nearest", "rotated, smoothed, sorted", "reach searched", "as saved"):
        shown.add_column(name, justify="left" if name == "layer" else "right")
    rows: dict[str, list[dict[str, float]]] = {}
    for layer in report["layers"]:
        for linear in layer["linears"]:
            rows.setdefault(re.sub(r"\.\d+\.", ".*.", linear["name"]), []).append(linear)
    for name, found in rows.items():
        means = [sum(each[column] ** 2 for each in found) / len(found) for column in columns]
        shown.add_row(name, *(f"{mean**0.5:.4f}" for mean in means))
    return shown


def unreached(report: dict[str, Any]) -> str:
    """A sentence about experts to which no text came; "" where there are none."""
    found = [f"{layer['layer']}.{name}" for layer in report["layers"] for name in layer.get("unreached", ())]
    if not found:
        return ""
    shown = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    return f"No token reached {len(found)} experts, which are rounded to the nearest: {shown}. A longer text may help."
