"""Model versions: whole or not there, switched at once, never lost while in use."""

from __future__ import annotations

import json
import logging
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from maestro_agents.protocol import ConfigError
from maestro_backend.predictor.training import Manifest, Version, Versions


def saving(text: str) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        (folder / "trees").mkdir()
        (folder / "trees" / "p50.txt").write_text(text)
        (folder / "tables.json").write_text("{}")

    return save


def add(versions: Versions, text: str = "model", **options: bool) -> Version:
    return versions.add(saving(text), Manifest(1_800_000_000.0, 500, {"mae": 12.5}), **options)


@pytest.fixture
def versions(tmp_path: Path) -> Versions:
    return Versions(tmp_path / "models")


def current(versions: Versions) -> str | None:
    """As somebody who has just come sees it."""
    found = Versions(versions.folder).current()
    return found.name if found else None


def test_at_first_there_is_none(versions: Versions) -> None:
    assert (versions.current(), versions.all()) == (None, [])
    assert versions.rollback("nothing to leave") is None


def test_what_was_added_is_current_with_its_manifest(versions: Versions) -> None:
    first, second = add(versions, "one"), add(versions, "two")
    found = Versions(versions.folder).current()
    assert found == second
    assert found.name == "v000002"
    assert (found.folder / "trees" / "p50.txt").read_text() == "two"
    assert found.manifest.metrics == {"mae": 12.5}
    assert (first.manifest.parent, found.manifest.parent) == ("", "v000001")
    assert set(found.manifest.files) == {"trees/p50.txt", "tables.json"}
    raw = json.loads((found.folder / "manifest.json").read_text())
    assert (raw["format"], raw["calls"], raw["made_at"]) == (1, 500, 1_800_000_000.0)


def test_only_we_can_look_in(versions: Versions) -> None:
    add(versions)
    for folder in (versions.folder, versions.folder / "v000001"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_one_that_is_not_installed_waits(versions: Versions) -> None:
    add(versions)
    add(versions, install=False)
    assert current(versions) == "v000001"
    assert versions.install("v000002").name == current(versions) == "v000002"
    with pytest.raises(ConfigError, match=r"no good version v000009.*v000001, v000002"):
        versions.install("v000009")
    with pytest.raises(ConfigError, match="no good version"):
        versions.install("../elsewhere")


def test_the_newest_five_stay_and_the_current_one_always(versions: Versions) -> None:
    add(versions)
    for _ in range(6):
        add(versions, install=False)
    names = [version.name for version in versions.all()]
    assert names == ["v000001", *(f"v00000{number}" for number in range(3, 8))]
    add(versions)
    assert [version.name for version in versions.all()] == [f"v00000{n}" for n in range(4, 9)]
    assert sorted(path.name for path in versions.folder.iterdir()) == [
        ".lock",
        "current",
        *(f"v00000{number}" for number in range(4, 9)),
    ]


def test_rolling_back_goes_to_the_one_before_and_stays_there(
    versions: Versions, caplog: pytest.LogCaptureFixture
) -> None:
    add(versions)
    add(versions)
    assert versions.rollback("worse", "v000001").name == "v000002", "another one is current"  # type: ignore[union-attr]
    assert versions.rollback("worse than the tables").name == "v000001"  # type: ignore[union-attr]
    assert "v000002 is rolled back to v000001: worse than the tables" in caplog.text
    assert add(versions).manifest.parent == "v000001"
    assert versions.rollback("worse again").name == current(versions) == "v000001"  # type: ignore[union-attr]
    assert versions.rollback("all bad") is None
    assert current(versions) is None, "the plain tables, not one that was left"
    assert len(versions.all()) == 3, "they are there to be looked at"
    versions.install("v000002")
    assert current(versions) == "v000002"


def test_rolling_back_the_only_one_leads_to_the_tables_not_to_one_never_used(
    versions: Versions,
) -> None:
    add(versions)
    add(versions, install=False)
    assert versions.rollback("worse") is None
    assert current(versions) is None


def damage_a_byte(folder: Path) -> None:
    (folder / "trees" / "p50.txt").write_text("modem")


def cut_the_manifest(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text[: len(text) // 2])


def lose_a_file(folder: Path) -> None:
    (folder / "tables.json").unlink()


def add_a_file(folder: Path) -> None:
    (folder / "model.pkl").write_bytes(b"cos\nsystem\n")


def link_out(folder: Path) -> None:
    (folder / "tables.json").unlink()
    (folder / "tables.json").symlink_to("/etc/hostname")


def come_from_the_future(folder: Path) -> None:
    raw = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**raw, "format": 2}))


def lose_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    "harm",
    [
        damage_a_byte,
        cut_the_manifest,
        lose_a_file,
        add_a_file,
        link_out,
        come_from_the_future,
        lose_the_manifest,
    ],
)
def test_a_broken_or_foreign_version_is_skipped_and_told_once(
    versions: Versions, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    add(versions)
    second = add(versions)
    harm(second.folder)
    for _ in range(3):
        found = versions.current()
        assert found is not None
        assert found.name == "v000001"
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "v000002 is skipped" in record.message
    assert "\n" not in record.message
    assert add(versions).name == "v000003", "its number is not given again"


def test_a_note_that_is_lost_or_broken_costs_nothing(versions: Versions) -> None:
    add(versions)
    add(versions)
    for note in (b"v000009", b"../..", b"\xff\xfe"):
        (versions.folder / "current").write_bytes(note)
        assert current(versions) == "v000002"
    (versions.folder / "current").unlink()
    assert current(versions) == "v000002"


def test_a_save_that_fails_leaves_nothing(versions: Versions) -> None:
    add(versions)

    def fails(folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError(28, "No space left on device")

    with pytest.raises(ConfigError, match=r"No space left on device.*free some space"):
        versions.add(fails, Manifest(0, 0))
    assert current(versions) == "v000001"
    assert [path.name for path in versions.folder.glob(".new*")] == []


def test_a_scratch_folder_goes_and_one_that_was_left_goes_with_the_next_version(
    versions: Versions,
) -> None:
    with versions.scratch() as folder:
        (folder / "model").write_text("")
        assert versions.all() == []
    (versions.folder / f"{folder.name}-left").mkdir()
    add(versions)
    assert sorted(path.name for path in versions.folder.iterdir()) == [
        ".lock",
        "current",
        "v000001",
    ]


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match="cannot write model versions to"):
        add(Versions(tmp_path / "taken" / "models"))


ADD_UNTIL_KILLED = """
import sys
from pathlib import Path
from maestro_backend.predictor.training import Manifest, Versions

def save(folder):
    for name in "abcdefgh":
        (folder / name).write_bytes(b"x" * 10_000)

versions = Versions(Path(sys.argv[1]))
while True:
    print(versions.add(save, Manifest(0.0, 1)).name, flush=True)
"""


def test_a_writer_that_is_killed_leaves_only_whole_versions(versions: Versions) -> None:
    for wait_s in (0.0, 0.003, 0.007):
        writer = subprocess.Popen(
            (sys.executable, "-c", ADD_UNTIL_KILLED, str(versions.folder)),
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        )
        with writer:
            assert writer.stdout is not None
            for _ in range(3):
                name = writer.stdout.readline().strip()
            time.sleep(wait_s)
            writer.kill()
        fresh = Versions(versions.folder)
        found = fresh.current()
        assert found is not None
        assert found.name >= name
        assert all(version.manifest.files for version in fresh.all())
    add(versions)
    assert [path.name for path in versions.folder.glob(".new*")] == []
