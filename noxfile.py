"""The conformance matrix: the tests that meet transformers, under each version that a user may have.

nox -s matrix              all versions, in the environment that nox runs in
nox -s "matrix(5.17)"      one of them
nox -s matrix -- -k llama  what follows goes to pytest, in place of the whole selection
nox -s fresh               newest transformers in an environment of its own, installed as a user would

`matrix` puts one version and what it needs into a folder that Python looks into first, so that torch is not installed
again for each of them; a folder that is there is used again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nox

NEWEST = "newest"
HOSTS = ("5.17.0", "5.18.0", "5.20.2", NEWEST)
TESTS = (
    "tests/integration/test_generate.py",
    "tests/integration/test_forward.py",
    "tests/methods/test_limits.py",
    "tests/weights/qoq/test_loading.py",
    "tests/weights/bitdelta/test_loading.py",
    "tests/scale/test_tensor_parallel.py",
    "tests/test_models.py",
)

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["matrix"]


@nox.session(venv_backend="none")
@nox.parametrize("host", HOSTS, ids=[host.removesuffix(".0") for host in HOSTS])
def matrix(session: nox.Session, host: str) -> None:
    """Models, methods, checkpoints and tensor parallelism on one version of transformers."""
    folder = Path(session.cache_dir).resolve() / f"transformers-{host}"
    if host == NEWEST or not (folder / "transformers").is_dir():
        wanted = "transformers" if host == NEWEST else f"transformers=={host}"
        session.run(sys.executable, "-m", "pip", "install", "-q", "--upgrade", "--target", str(folder), wanted)
    env = {"PYTHONPATH": os.pathsep.join((str(folder), str(Path.cwd())))}
    session.run(sys.executable, "-c", "import transformers; print(transformers.__version__)", env=env)
    session.run(sys.executable, "-m", "pytest", "-q", *(session.posargs or TESTS), env=env)


@nox.session
def fresh(session: nox.Session) -> None:
    """Install transformers, then the package, which must not move it; then the same tests."""
    session.install("transformers", "--upgrade")
    before = _version(session)
    session.install("-e", ".[test]")
    if _version(session) != before:
        session.error(f"installing hf_longctx moved transformers from {before} to {_version(session)}")
    session.run("pytest", "-q", "-n", "auto", *(session.posargs or TESTS))


def _version(session: nox.Session) -> str:
    code = "import importlib.metadata as m; print(m.version('transformers'))"
    return str(session.run("python", "-c", code, silent=True)).strip()
