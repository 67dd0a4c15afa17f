"""The documentation says what the code does: messages that exist, models as they are, pages for all methods."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from hf_longctx.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_every_message_of_the_catalogue_is_one_of_the_code() -> None:
    said = re.findall(r"^\| `(.+?)` \|", (DOCS / "errors.md").read_text(), re.MULTILINE)
    assert len(said) > 10
    # a literal may be cut over several lines, and its middle may be a value
    code = " ".join(file.read_text() for file in (ROOT / "hf_longctx").rglob("*.py"))
    code = re.sub(r'"\s*f?"', "", re.sub(r"\{[^{}]*\}", "", code))
    missing = [message for message in said if re.sub(r"\s+", " ", message) not in re.sub(r"\s+", " ", code)]
    assert missing == []


def test_every_method_has_a_page() -> None:
    pages = {page.stem for page in (DOCS / "methods").glob("*.md")}
    assert set(METHODS) - {"auto", "dense"} <= pages
    index = (DOCS / "methods" / "index.md").read_text()
    assert all(f"`{name}`" in index for name in METHODS)


def test_the_table_of_models_is_that_of_the_cases() -> None:
    spec = importlib.util.spec_from_file_location("models_table", DOCS / "models_table.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    text = made.PAGE.read_text()
    assert text == made.page(text), "run python docs/models_table.py"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_short_and_have_their_outputs(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    assert len(cells) <= 12
    ran = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in ran] == list(range(1, len(ran) + 1))
    outputs = [output for cell in ran for output in cell["outputs"]]
    assert all(output["output_type"] != "error" and output.get("name") != "stderr" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in ran[-1]["outputs"])
    assert not re.search(r"/root/|/home/|/tmp/", json.dumps(cells))
