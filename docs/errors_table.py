"""The list of refusals of `errors.md`, from every `UnsupportedError` in the code: python docs/errors_table.py."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = ROOT / "hf_longctx"
PAGE = ROOT / "docs" / "errors.md"
BEGIN, END = "<!-- table: docs/errors_table.py -->", "<!-- end of table -->"
ERROR = "UnsupportedError"


def table() -> str:
    """A row for each message, room by room; what depends on the call is a dot dot dot."""
    found: dict[tuple[str, str], None] = {}
    for path in sorted(CODE.rglob("*.py")):
        room = path.relative_to(CODE).with_suffix("").as_posix()
        for message in messages(path.read_text()):
            found[room, message] = None
    rows = [f"| {message} | `{room}` |" for room, message in found]
    return "\n".join(["| message | from |", "|---|---|", *rows])


def messages(code: str) -> Iterator[str]:
    """Texts of the errors that a module makes, in the order of its lines."""
    made = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    for call in sorted((node for node in made if _name(node) == ERROR), key=lambda node: node.lineno):
        text = " ".join(_text(call.args[0]).split())
        yield re.sub(r"…[\s…]*…", "…", text).replace("|", "\\|").replace("<", "&lt;").replace("_", "\\_")


def _text(node: ast.expr) -> str:
    """What can be read of an expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    if isinstance(node, ast.Call) and _name(node) == "say":
        where, expected, got, advice = map(_text, node.args)
        return f"{where}: expected {expected}; got {got}. {advice}."
    return "…"


def _name(call: ast.Call) -> str:
    return getattr(call.func, "id", getattr(call.func, "attr", ""))


def page(text: str) -> str:
    """The page with the table as it should be."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
