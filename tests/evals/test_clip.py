"""The real clip: fetched once, pinned, credited; and looped so that no two seconds are alike."""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hf_longctx.evals import clip
from hf_longctx.evals.assets import AssetError
from hf_longctx.streaming.source import frames

from ..stream.films import film

NPM = "#!/bin/sh\ncp '{}' video-1.0.0.tgz\n"


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> clip.PackedClip:
    """A package with a tiny film, served by an npm that copies."""
    content = film(tmp_path / "film.mp4", 5).read_bytes()
    with tarfile.open(tmp_path / "served.tgz", "w:gz") as archive:
        member = tarfile.TarInfo("package/film.mp4")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(NPM.format(tmp_path / "served.tgz"))
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
    monkeypatch.setenv("HF_LONGCTX_CACHE", str(tmp_path / "cache"))
    digests = [hashlib.sha256(each).hexdigest() for each in ((tmp_path / "served.tgz").read_bytes(), content)]
    return clip.PackedClip("film", "video@1.0.0", digests[0], "package/film.mp4", digests[1], "By me\n")


def test_it_is_fetched_once_with_its_credit(packed: clip.PackedClip, tmp_path: Path) -> None:
    steps: list[str] = []
    path = clip.fetch(packed, steps.append)
    assert path == tmp_path / "cache" / "film" / "film.mp4"
    assert (path.parent / "CREDIT.txt").read_text() == "By me\n"
    assert len(list(frames(path, fps=10))) == 5
    (tmp_path / "bin" / "npm").unlink()
    assert clip.fetch(packed, steps.append) == path
    assert len(steps) == 1


@pytest.mark.parametrize("pin", ["package_sha256", "video_sha256"])
def test_other_content_is_refused_and_leaves_nothing(packed: clip.PackedClip, tmp_path: Path, pin: str) -> None:
    with pytest.raises(AssetError, match="expected SHA-256 0000"):
        clip.fetch(replace(packed, **{pin: "0000"}))
    assert list((tmp_path / "cache").iterdir()) == []


def test_npm_that_is_missing_or_fails(packed: clip.PackedClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "bin" / "npm"
    npm.write_text("#!/bin/sh\necho 'no such package' >&2\nexit 1\n")
    with pytest.raises(AssetError, match=r"npm could not fetch video@1\.0\.0: no such package"):
        clip.fetch(packed)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AssetError, match="needs npm"):
        clip.fetch(packed)


def test_a_loop_shows_another_sign_every_second(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mkv", 20, rate=10, size=(60, 80))
    shown = list(clip.looped(path, 9, fps=2))
    assert [t for t, _ in shown] == [k / 2 for k in range(18)]
    signs = [picture[:15, :35].tobytes() for _, picture in shown]
    assert [signs[k] == signs[k - 1] for k in range(1, 18)] == [k % 2 == 1 for k in range(1, 18)]
    assert np.array_equal(shown[0][1][30:], shown[4][1][30:])  # two seconds of film, again
    assert not np.array_equal(shown[0][1], shown[4][1])
    assert [cue.text for cue in clip.reference(3)] == ["red 0", "blue 1", "red 2"]
    assert tuple(shown[0][1][1, 1]) == (220, 30, 30)


@pytest.mark.network
def test_the_real_clip(bunny: Path) -> None:
    source = frames(bunny, fps=2)
    assert source.duration == pytest.approx(30, abs=0.1)
    got = list(source)
    assert [frame.t for frame in got] == [k / 2 for k in range(60)]
    assert got[0].image.shape == (480, 854, 3)
