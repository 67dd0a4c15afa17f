"""What the README promises about installation, checked without installing."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
tomllib = pytest.importorskip("tomllib")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def name_of(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9_.-]", requirement)[0].lower().replace("_", "-")


@pytest.mark.parametrize(("extra", "then"), [("demo", "hf-longctx demo"), ("test", "pytest")])
def test_the_readme_holds_the_commands_that_ci_runs(extra: str, then: str) -> None:
    command = f"pip install -c constraints.txt -e '.[{extra}]' && {then}"
    assert command in (ROOT / "README.md").read_text().splitlines()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_dependencies_have_lower_bounds_only(project: dict[str, Any]) -> None:
    extras = project["optional-dependencies"]
    for requirement in project["dependencies"] + [r for extra in ("demo", "test", "plot") for r in extras[extra]]:
        bounds = requirement.split(";")[0]
        assert re.fullmatch(r"[\w.-]+>=[\d.]+", bounds.strip()), requirement


def test_what_the_readme_commands_install_is_pinned(project: dict[str, Any]) -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    pinned = {name_of(pin.split("==")[0]) for pin in pins}
    wanted = project["dependencies"] + [
        r for extra in ("demo", "test", "dev") for r in project["optional-dependencies"][extra]
    ]
    assert {name_of(requirement) for requirement in wanted} - pinned == set()


def test_the_licence_is_the_standard_text() -> None:
    lines = (ROOT / "LICENSE").read_text().split("\n")
    assert [line.strip() for line in lines[:3]] == [
        "Apache License",
        "Version 2.0, January 2004",
        "http://www.apache.org/licenses/",
    ]
    assert (ROOT / "hf_longctx" / "py.typed").exists()


def test_build_toml_names_what_setup_builds() -> None:
    described = tomllib.loads((ROOT / "csrc" / "build.toml").read_text())
    kernels = described["kernel"].values()
    named = [source for kernel in kernels for source in kernel["src"]]
    there = [
        file.relative_to(ROOT / "csrc").as_posix() for kind in ("*.cu", "*.cpp") for file in (ROOT / "csrc").rglob(kind)
    ]
    assert sorted(named) == sorted(there)
    archs = re.search(r'^ARCHS = "(.*)"$', (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert archs is not None
    built = {arch for arch in archs[1].split(";") if not arch.endswith("+ptx")}
    for kernel in kernels:
        assert kernel["backend"] in described["general"]["backends"]
        if kernel["backend"] == "cuda":
            assert {capability.replace(".", "") for capability in kernel["cuda-capabilities"]} == built


def test_the_citation_names_every_paper_that_the_readme_links() -> None:
    cited = set(re.findall(r'"arXiv:(\d{4}\.\d{5})"', (ROOT / "CITATION.cff").read_text()))
    assert len(cited) == 10
    assert set(re.findall(r"arxiv\.org/abs/(\d{4}\.\d{5})", (ROOT / "README.md").read_text())) <= cited
