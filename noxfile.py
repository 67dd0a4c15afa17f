"""The conformance matrix: the tests that meet transformers, under each version that a user may have.

nox                        all sessions
nox -s "hosts(5.17)"       one of them

Each session installs one transformers, then the package as a user would, and checks that the version stayed.
"""

from __future__ import annotations

import nox

NEWEST = "newest"
HOSTS = ("5.17.0", "5.18.0", "5.20.2", NEWEST)
TESTS = ("tests/integration", "tests/methods", "tests/test_models.py", "tests/test_outlook.py")

nox.options.default_venv_backend = "venv"


@nox.session
@nox.parametrize("host", HOSTS, ids=[host.removesuffix(".0") for host in HOSTS])
def hosts(session: nox.Session, host: str) -> None:
    """Models, methods and plans on one version of transformers."""
    wanted = "transformers" if host == NEWEST else f"transformers=={host}"
    session.install(wanted, "--upgrade")
    before = _version(session)
    session.install("-e", ".[test]")
    if _version(session) != before:
        session.error(f"installing hf_longctx moved transformers from {before} to {_version(session)}")
    session.run("pytest", "-q", "-n", "auto", *(session.posargs or TESTS))


def _version(session: nox.Session) -> str:
    code = "import importlib.metadata as m; print(m.version('transformers'))"
    return str(session.run("python", "-c", code, silent=True)).strip()
