"""What stands around a model: tokenizers, pipelines, streamers, device maps and offloading."""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import Any

import accelerate
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

import hf_longctx as lc

from ..methods.cases import LIMITS, LOSSY, Row, named
from ..methods.test_limits import TOLERANCE, error
from .cases import BY_NAME
from .test_generate import batch, generate
from .tiny import VOCABULARY, Case

LLAMA = BY_NAME["llama"]
TEXTS = [" ".join(f"w{7 * i * step % 120 + 8}" for i in range(length)) for length, step in ((40, 1), (23, 3), (31, 5))]
rows = pytest.mark.parametrize("row", LOSSY, ids=named)


@pytest.fixture(scope="module")
def tokenizer() -> hf.PreTrainedTokenizerFast:
    """Token `i` is the word `wi`; padding is 0."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", unk_token="w3", padding_side="left")


@rows
def test_pipeline_alone_and_in_a_batch(row: Row, tokenizer: Any) -> None:
    model = lc.patch(LLAMA.make(), row.method(LLAMA))
    pipe = hf.pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 9, "do_sample": False, "return_full_text": False}
    alone = [pipe(text, **options)[0]["generated_text"] for text in TEXTS]
    together = pipe(TEXTS, batch_size=3, **options)
    assert [out[0]["generated_text"] for out in together] == alone
    ids = model.generate(**tokenizer(TEXTS[0], return_tensors="pt"), max_new_tokens=9, do_sample=False, use_cache=False)
    assert alone[0] == tokenizer.decode(ids[0, -9:], skip_special_tokens=True)


@rows
def test_a_streamer_in_another_thread(row: Row, tokenizer: Any) -> None:
    model = lc.patch(LLAMA.make(), row.method(LLAMA))
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    options = {**inputs, "max_new_tokens": 9, "do_sample": False}
    expected = tokenizer.decode(model.generate(**options)[0, -9:])
    streamer = hf.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(target=model.generate, kwargs={**options, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == expected
    assert len([piece for piece in pieces if piece]) > 1


def test_two_threads_on_one_model(tokenizer: Any) -> None:
    """Each call has a context of its own."""
    model = lc.patch(LLAMA.make(), LOSSY[0].method(LLAMA))
    inputs = [tokenizer(text, return_tensors="pt") for text in TEXTS]
    expected = [model.generate(**each, max_new_tokens=20, do_sample=False) for each in inputs]
    got: dict[int, Any] = {}

    def work(number: int) -> None:
        got[number] = model.generate(**inputs[number], max_new_tokens=20, do_sample=False)

    threads = [Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[number], expected[number]) for number in range(3))


# devices --------------------------------------------------------------------------------------------------------------

FAMILIES = [BY_NAME[name] for name in ("llama", "falcon_new", "mpt", "gemma3")]


def saved(case: Case, path: Path) -> str:
    case.make().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("case", FAMILIES, ids=named)
@rows
def test_loaded_with_a_device_map(row: Row, case: Case, tmp_path: Path) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(saved(case, tmp_path), device_map={"": "cpu"})
    expected = generate(lc.patch(case.make(), row.method(case)), batch(case)).sequences
    assert torch.equal(generate(lc.patch(model, row.method(case)), batch(case)).sequences, expected)


OFFLOADS = {
    "cpu": lambda model, path: accelerate.cpu_offload(model, execution_device="cpu"),
    "disk": lambda model, path: accelerate.disk_offload(model, path, execution_device="cpu"),
    "dispatch": lambda model, path: accelerate.dispatch_model(
        model, {name: "disk" for name, _ in model.named_children()}, main_device="cpu", offload_dir=path
    ),
}


@pytest.mark.parametrize("order", ["patch_first", "offload_first"])
@pytest.mark.parametrize("where", OFFLOADS)
@pytest.mark.parametrize("case", FAMILIES, ids=named)
@rows
@torch.no_grad()
def test_offloaded_weights(row: Row, case: Case, where: str, order: str, tmp_path: Path) -> None:
    expected = generate(lc.patch(case.make(), row.method(case)), batch(case)).sequences
    stock = case.make()(**batch(case)).logits
    model = case.make()
    if order == "patch_first":
        lc.patch(model, row.method(case))
    OFFLOADS[where](model, str(tmp_path))
    lc.patch(model, row.method(case))
    assert any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(generate(model, batch(case)).sequences, expected)
    assert error(lc.unpatch(model)(**batch(case)).logits, stock) < TOLERANCE


@rows
def test_a_model_moved_to_another_type_while_patched(row: Row) -> None:
    model = lc.patch(LLAMA.make(), row.method(LLAMA)).to(torch.bfloat16)
    fresh = lc.patch(LLAMA.make().to(torch.bfloat16), row.method(LLAMA))
    assert torch.equal(generate(model, batch(LLAMA)).sequences, generate(fresh, batch(LLAMA)).sequences)
    assert lc.report(model).kv_bytes == lc.report(fresh).kv_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("row", LIMITS, ids=named)
@torch.no_grad()
def test_half_types_are_as_near_to_float32_as_the_unpatched_model(row: Row, dtype: torch.dtype) -> None:
    exact = LLAMA.make()(**batch(LLAMA)).logits[1]
    stock = LLAMA.make().to(dtype)(**batch(LLAMA)).logits[1]
    model = lc.patch(LLAMA.make().to(dtype), row.method(LLAMA))
    got = model(**batch(LLAMA)).logits[1]
    assert got.dtype == dtype
    assert error(got.float(), exact) < 2 * error(stock.float(), exact)
