"""The render_heads stage: resumable, independent of workers, strict about settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hyperdb import heads
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_json
from hyperdb.stages.render_heads import Config, run


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("data-*"))}


def test_resumes_and_does_not_depend_on_workers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Config(out=str(tmp_path / "a"), identities=3, views=2, photo_views=1, shard=2, size=32)
    folder = run(config)
    first = _bytes(folder)
    assert len(first) == 2
    assert (folder / "index.json").is_file()
    (folder / "data-00001-of-00002.arrow").unlink()
    assert _bytes(run(config)) == first
    shard = folder / "data-00000-of-00002.arrow"
    shard.write_bytes(shard.read_bytes()[:-9])  # cut off, as a copy that was interrupted is
    assert _bytes(run(config)) == first
    capsys.readouterr()
    content = bytearray(shard.read_bytes())
    content[-3000] ^= 4  # a bit of a picture
    shard.write_bytes(content)
    assert _bytes(run(config)) == first
    assert capsys.readouterr().out == f"{shard} is damaged and is made again\n"
    (folder / "index.json").write_text('{"checksums": 3}')
    assert _bytes(run(config)) == first
    assert set(load_json(folder / "index.json")["checksums"]) == set(first)
    other = run(replace(config, out=str(tmp_path / "b"), workers=1))
    assert _bytes(other) == first
    with pytest.raises(UserError, match="views=2 there, 3 now"):
        run(replace(config, views=3))


def test_people_drawn_otherwise_are_not_mixed_in(rendered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(**load_json(rendered / "index.json")["config"])
    before = _bytes(rendered)
    assert _bytes(run(config)) == before
    name = heads.ALGORITHM
    monkeypatch.setattr(heads, "ALGORITHM", "another")
    with pytest.raises(UserError, match=f"heads_sha256='{name}' there, 'another' now"):
        run(config)
    assert _bytes(rendered) == before


@pytest.mark.parametrize("bad", [{"split": "dev"}, {"identities": 0}, {"photo_views": 9}])
def test_bad_settings_are_named(tmp_path: Path, bad: dict) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        run(Config(out=str(tmp_path / "x"), **bad))
