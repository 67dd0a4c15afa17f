"""The table of `models.md`, from the cases that the integration tests run: python docs/models_table.py."""

from __future__ import annotations

import sys
from pathlib import Path

import transformers as hf

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- table: docs/models_table.py -->", "<!-- end of table -->"


def table() -> str:
    """A row for each family and variant, and one for each that is refused."""
    sys.path.insert(0, str(ROOT))
    import hf_longctx as lc
    from tests.integration.cases import CASES

    methods = ("streaming_llm", "quest", "xattention", "inf_llm")
    lines = [
        f"| model class | variant | positions | {' | '.join(f'`{name}`' for name in methods)} |",
        f"|---|---|---|{'---|' * len(methods)}",
    ]
    refused = ["| model class | why not |", "|---|---|"]
    for case in CASES:
        hf.set_seed(0)
        model = case.make()
        kind, variant = type(model).__name__, case.name.replace("_", " ")
        answers = {answer.method: answer for answer in lc.supports(model)}
        if case.refused is not None:
            said = answers["dense"].reason.partition("; got ")[2].partition(". Use")[0]
            refused.append(f"| `{kind}` | {said} |")
            continue
        where = case.positions if case.rope in (None, "default") else f"{case.positions}, {case.rope}"
        marks = ("yes" if answers[name].ok else "no" for name in methods)
        lines.append(f"| `{kind}` | {variant} | {where} | {' | '.join(marks)} |")
    return "\n".join([*lines, "", "Refused, by name:", "", *refused])


def page(text: str) -> str:
    """The page with the table as it should be."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
