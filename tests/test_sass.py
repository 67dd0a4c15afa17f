"""What `.ci/sass` makes of machine code that is written out here; of a built library it runs in `.ci/run`."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ASKED = "IGMMA.64x16x32.U8.S8 R24, R32, gdesc[UR12], R24"
LAST = "IGMMA.64x16x32.U8.S8 R24, R36, gdesc[UR12], R24, gsb0"
ALL_BUT_ONE, ALL = (f"WARPGROUP.DEPBAR.LE gsb0, 0x{left}" for left in (1, 0))


def written(*instructions: str) -> bool:
    lines = (f"        /*{16 * i:04x}*/  {text} ;  /* 0x0 */" for i, text in enumerate(instructions))
    sass = runpy.run_path(str(Path(__file__).resolve().parents[1] / ".ci" / "sass"))
    return bool(sass["overwritten"]("\n".join(lines)))


@pytest.mark.parametrize("write", ["LDS.128 R36, [R9]", "@!P1 IMAD R34, R5, R6, R7", "LDS.64 R38, [R9]", "MOV R39, RZ"])
def test_operands_of_products_under_way_are_left_alone(write: str) -> None:
    assert written(ASKED, LAST, write, ALL)
    assert written(ASKED, LAST, ALL_BUT_ONE, write)
    assert not written(write, ASKED, LAST, ALL, write)
    assert not written(ASKED, LAST, ASKED.replace("R32", "R40"), LAST.replace("R36", "R44"), ALL_BUT_ONE, write)


@pytest.mark.parametrize(
    "other", ["LDS.128 R40, [R36]", "STS.128 [R9], R32", "R2UR UR4, R32", "ISETP.NE.AND P1, PT, R32, RZ, PT"]
)
def test_what_writes_none_of_them_is_not_named(other: str) -> None:
    assert not written(ASKED, LAST, other, ALL)
