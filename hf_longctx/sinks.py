"""A token of its own for attention to rest on: learned, and at the beginning of every text."""

from __future__ import annotations

import copy
import json
import tempfile
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedModel

from .context import NAME
from .errors import UnsupportedError
from .models import decoder_of


def add_sink_token(model: PreTrainedModel, tokenizer: Any, token: str = "<|sink|>") -> int:
    """Give a model a learnable sink token, and let its tokenizer begin every text with it.

    Paper: StreamingLLM (arXiv:2309.17453) §3.3: a model that was trained with such a token in front of every text
    streams with `StreamingLLM(sinks=1)`. Differs: the token can come late; its embedding starts as the mean of all, and
    its row of an output layer that is not tied as the mean of those. It is trained as every embedding is, with LoRA by
    `LoraConfig(trainable_token_indices={"embed_tokens": [id]})`, and saved with model and tokenizer. A second call
    changes nothing.

    Args:
        model: an unpatched decoder without adapters. Its embeddings `[V, hidden]` grow to the tokenizer's length, if
            they are fewer; tied ones stay tied.
        tokenizer: of the `tokenizers` library. Texts begin with the token wherever special tokens are added, before one
            that they begin with already; so do chats, by the chat template.
        token: how it is written.

    Returns:
        Its id.

    Raises:
        TypeError: not a transformers model.
        ValueError: a model that is patched or has adapters, or a token that is empty or an ordinary word of the
            tokenizer; nothing was changed.
        UnsupportedError: a tokenizer that cannot begin with a token, or forgets it once it is saved; nothing was
            changed.
    """
    _check_model(model)
    _check_tokenizer(tokenizer, token)
    trial, known = copy.deepcopy(tokenizer), len(tokenizer)
    sink = _begin(trial, token)
    _check_kept(trial, sink)
    inputs: Any = model.get_input_embeddings()
    rows = inputs.weight.shape[0]
    if rows < len(trial):
        model.resize_token_embeddings(len(trial), mean_resizing=False)
    if sink >= min(rows, known):
        _start_at_mean(model, sink, min(rows, known))
    return _begin(tokenizer, token)


# the tokenizer --------------------------------------------------------------------------------------------------------


def _begin(tokenizer: Any, token: str) -> int:
    """Put a token in front of all that a tokenizer makes, if it is not there yet; gives its id."""
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
    sink = int(tokenizer.convert_tokens_to_ids(token))
    if tokenizer("").input_ids[:1] != [sink]:
        backend = tokenizer.backend_tokenizer
        backend.post_processor = _in_front(backend.post_processor, token, sink)
    written, given = f"{{{{ {json.dumps(token)} }}}}", tokenizer.chat_template
    if isinstance(given, dict):
        tokenizer.chat_template = {name: written + text.removeprefix(written) for name, text in given.items()}
    elif given is not None:
        tokenizer.chat_template = written + given.removeprefix(written)
    return sink


def _in_front(stock: Any, token: str, sink: int) -> Any:
    """A post-processor that does what `stock` does, and puts the token in front.

    Of several templates one after another the second finds pieces that it has no place for, so an existing one is
    extended; all others can be followed by one.
    """
    piece = {"SpecialToken": {"id": token, "type_id": 0}}
    entry = {token: {"id": token, "ids": [sink], "tokens": [token]}}
    a, b = ({"Sequence": {"id": name, "type_id": kind}} for name, kind in (("A", 0), ("B", 1)))
    own = {"type": "TemplateProcessing", "single": [piece, a], "pair": [piece, a, b], "special_tokens": entry}
    found = None if stock is None else json.loads(stock.__getstate__())
    parts = [] if found is None else found["processors"] if found["type"] == "Sequence" else [found]
    template = next((part for part in parts if part["type"] == "TemplateProcessing"), None)
    if template is None:
        parts = [*parts, own]
    else:
        template.update({side: [piece, *template[side]] for side in ("single", "pair")})
        template["special_tokens"].update(entry)
    empty = json.loads(Tokenizer(models.BPE()).to_str())
    made = {"type": "Sequence", "processors": parts} if len(parts) > 1 else parts[0]
    return Tokenizer.from_str(json.dumps({**empty, "post_processor": made})).post_processor


def _check_tokenizer(tokenizer: Any, token: str) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedError(
            "add_sink_token: expected a tokenizer of the tokenizers library, whose post-processor can begin a text; "
            f"got {type(tokenizer).__name__}. Load one with AutoTokenizer, or put the token into your texts yourself."
        )
    number = tokenizer.get_vocab().get(token)
    known = tokenizer.added_tokens_decoder.get(number)
    if not token or (number is not None and not (known is not None and known.special)):
        raise ValueError(
            f"add_sink_token: expected a token that is no ordinary word of the tokenizer; got '{token}'. Take another."
        )


def _check_kept(trial: Any, sink: int) -> None:
    """Whether texts begin with the token, once, now and after the tokenizer was saved and loaded."""
    with tempfile.TemporaryDirectory() as folder:
        trial.save_pretrained(folder)
        loaded = type(trial).from_pretrained(folder)
    for when, made in (("as it is", trial), ("saved and loaded", loaded)):
        for texts in (("a",), ("a", "b")):
            ids = list(made(*texts).input_ids)
            if ids[:1] != [sink] or ids.count(sink) != 1:
                raise UnsupportedError(
                    f"add_sink_token: expected a tokenizer that can begin every text with token {sink}; got "
                    f"{type(trial).__name__}, which {when} makes {ids} of {len(texts)} short text(s). Put the token "
                    "into your texts yourself."
                )


# the model ------------------------------------------------------------------------------------------------------------


def _check_model(model: PreTrainedModel) -> None:
    decoder, base = decoder_of(model)
    if base is not model or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"add_sink_token: expected a model without adapters; got {type(model).__name__} with some. Add the token "
            "first, then the adapters."
        )
    if decoder.config._attn_implementation == NAME:
        raise ValueError(
            "add_sink_token: expected an unpatched model, as its embeddings are replaced; got a patched one. Call "
            "hf_longctx.unpatch(model) first."
        )


@torch.no_grad()
def _start_at_mean(model: PreTrainedModel, sink: int, known: int) -> None:
    """Set the token's row of the embedding, and of an output layer of its own, to the mean of the first `known`."""
    made: Any = model
    for layer in (made.get_input_embeddings(), made.get_output_embeddings()):
        for weight in (getattr(layer, "weight", None), getattr(layer, "bias", None)):
            if weight is not None:
                weight[sink] = weight[:known].float().mean(0)
