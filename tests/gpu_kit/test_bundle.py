"""The GPU kit's bundle: pruned, packed, cut, checked and joined, on made-up files."""

import json
import os
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_kit import _bundle, _fatbin, _install, _parts
from gpu_kit._bundle import Cache, Pip
from gpu_kit._fatbin import CONTAINER, ELF, ENTRY, MAGIC, PTX, pruned
from gpu_kit._parts import KitError, Manifest, Sealed

ANY, FAMILY, ONLY = 0, 0x200000, 0x100000


def entry(kind: int, arch: int, flags: int = ANY, length: int = 64, header: int = 64) -> bytes:
    code = bytes([kind * 16 + arch % 16]) * length
    return ENTRY.pack(kind, 0x101, header, length, arch, flags).ljust(header, b"h") + code


def fatbin(*entries: bytes) -> bytes:
    code = b"".join(entries)
    return CONTAINER.pack(MAGIC, 1, CONTAINER.size, len(code)) + code


def left_in(library: bytes) -> list[tuple[int, int]]:
    at = library.find(MAGIC)
    return [(e.kind, e.arch) for e in _fatbin.entries_at(library, at)]


@pytest.mark.parametrize(
    ("entries", "left"),
    [
        ([(ELF, 75), (ELF, 80), (ELF, 90), (ELF, 100)], [(ELF, 90)]),
        ([(ELF, 90, ONLY), (ELF, 80), (ELF, 90)], [(ELF, 90), (ELF, 90)]),
        ([(ELF, 90, ONLY), (PTX, 80), (ELF, 80)], [(ELF, 90), (PTX, 80)]),
        ([(ELF, 120, FAMILY), (PTX, 80), (ELF, 80)], [(PTX, 80)]),
        ([(PTX, 80), (ELF, 80), (PTX, 90), (ELF, 90)], [(ELF, 90)]),
        ([(PTX, 100), (PTX, 90)], [(PTX, 90)]),
    ],
    ids=["others", "both 90 and 90a", "90a and PTX", "PTX alone", "PTX beside code", "newer PTX"],
)
def test_what_a_hopper_may_run_is_left(
    entries: list[tuple[int, ...]], left: list[tuple[int, int]]
) -> None:
    library = b"before" + fatbin(*(entry(*given) for given in entries)) + b"after"
    slim = pruned(library)
    assert left_in(slim) == left
    assert len(slim) == len(library)
    assert slim.startswith(b"before") and slim.endswith(b"after")


def test_what_is_left_is_as_it_was() -> None:
    hopper = entry(ELF, 90, ONLY, length=128, header=112)
    slim = pruned(fatbin(entry(ELF, 80), hopper, entry(ELF, 120, FAMILY)))
    assert slim.startswith(fatbin(hopper))
    assert not any(slim[len(fatbin(hopper)) :])


def test_a_fatbin_for_others_alone_keeps_its_smallest_entry() -> None:
    small = entry(ELF, 80, length=8)
    assert pruned(fatbin(entry(ELF, 75), small, entry(ELF, 86))).startswith(fatbin(small))


def test_every_fatbin_of_a_library_is_pruned() -> None:
    one = fatbin(entry(ELF, 80), entry(ELF, 90))
    assert pruned(one + b"\0" * 24 + one).count(entry(ELF, 90)) == 2
    assert entry(ELF, 80) not in pruned(one + b"\0" * 24 + one)


def test_pruning_twice_is_pruning_once() -> None:
    slim = pruned(fatbin(entry(ELF, 80), entry(ELF, 90), entry(PTX, 90)) + b"rest")
    assert pruned(slim) == slim


@pytest.mark.parametrize(
    "odd",
    [
        MAGIC,
        MAGIC + b"\x02" + fatbin(entry(ELF, 80))[5:],
        fatbin(entry(ELF, 80))[:-1],
        fatbin(entry(ELF, 80), entry(7, 80)),
        fatbin(entry(ELF, 80), b"\0" * 8),
        fatbin(entry(ELF, 80, length=63), entry(ELF, 90)),
    ],
    ids=["only a magic", "version", "cut off", "kind", "leftover", "length"],
)
def test_what_is_not_understood_stays(odd: bytes) -> None:
    assert pruned(b"text" + odd) == b"text" + odd


@given(st.lists(st.sampled_from([MAGIC, fatbin(entry(ELF, 80)), b"\0", b"\xff" * 9]), max_size=8))
def test_no_bytes_break_the_pruning(pieces: list[bytes]) -> None:
    library = b"".join(pieces)
    assert len(pruned(library)) == len(library)


def made_wheel(path: Path, files: dict[str, bytes]) -> Path:
    rows = "".join(f"{name},sha256=x,{len(content)}\n" for name, content in files.items())
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
        wheel.writestr("vllm-1.dist-info/RECORD", f"{rows}vllm-1.dist-info/RECORD,,\n")
    return path


def test_the_subset_of_vllm_is_a_wheel_with_a_true_record(tmp_path: Path) -> None:
    library = fatbin(entry(ELF, 80), entry(ELF, 90))
    files = {
        "vllm/__init__.py": b"code",
        "vllm/_C_stable_libtorch.abi3.so": library,
        "vllm/_moe_C_stable_libtorch.abi3.so": library,
        "vllm/vllm-rs": b"rust",
        "vllm/third_party/pynvml.py": b"nvml",
        "vllm/third_party/deep_gemm/__init__.py": b"gemm",
    }
    wheel = made_wheel(tmp_path / "old.whl", files)
    small = _bundle.repacked(wheel, tmp_path / "new.whl", _bundle.is_needed, _bundle.hopper_only)
    with zipfile.ZipFile(small) as found:
        record = found.read("vllm-1.dist-info/RECORD").decode()
        listed = {line.partition(",")[0] for line in record.splitlines()}
        assert listed == set(found.namelist())
        assert found.read("vllm/_C_stable_libtorch.abi3.so") == pruned(library)
    gone = {"vllm/_moe_C_stable_libtorch.abi3.so", "vllm/vllm-rs"}
    assert listed - {"vllm-1.dist-info/RECORD"} == set(files) - gone - {
        "vllm/third_party/deep_gemm/__init__.py"
    }
    assert "sha256=x" not in record


def test_every_requirement_is_an_exact_version() -> None:
    lines = _bundle.requirements()
    assert lines and all(line.count("==") == 1 and "*" not in line for line in lines)
    names = [_bundle.normal(line.partition("==")[0]) for line in lines]
    assert names == sorted(set(names))
    assert not {"torch", "numpy", "transformers", "triton"} & set(names)


def test_a_bundle_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    made: list[str] = []

    def make(folder: Path) -> Path:
        made.append("made")
        (folder / "piece").write_text("content")
        return folder / "piece"

    assert Cache(tmp_path).made("key", make).read_text() == "content"
    (tmp_path / "unfinished-x").mkdir()
    assert Cache(tmp_path).made("key", make) == tmp_path / "piece"
    assert made == ["made"]
    assert not (tmp_path / "unfinished-x").exists()

    (tmp_path / "piece").write_text("contemt")
    assert Cache(tmp_path).made("key", make).read_text() == "content"
    assert len(made) == 2
    Cache(tmp_path).made("another key", make)
    assert Cache(tmp_path).get("key") is None

    (tmp_path / "finished.json").write_text('{"key": ')
    assert Cache(tmp_path).get("another key") is None


def test_a_failed_piece_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> Path:
        (folder / "half").write_text("half")
        raise KitError("no network")

    with pytest.raises(KitError):
        Cache(tmp_path).made("key", fail)
    assert list(tmp_path.iterdir()) == []


def test_only_missing_wheels_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def wheels(self: Pip, requirements: list[str], into: Path) -> None:
        asked.append(list(requirements))
        for line in requirements:
            name, _, version = line.partition("==")
            (into / f"{name.replace('-', '_')}-{version}-py3-none-any.whl").write_text(line)

    monkeypatch.setattr(Pip, "wheels", wheels)
    monkeypatch.setattr(_bundle, "requirements", lambda: ["jiter==1", "openai-harmony==2"])
    cache, pip = Cache(tmp_path), Pip("3.12", tmp_path / "pip.txt")
    _bundle.fetched_wheels(cache, pip)
    (tmp_path / "jiter-1-py3-none-any.whl").unlink()
    names = [file.name for file in _bundle.fetched_wheels(cache, pip)]
    assert names == ["jiter-1-py3-none-any.whl", "openai_harmony-2-py3-none-any.whl"]
    assert asked == [["jiter==1", "openai-harmony==2"], ["jiter==1"]]


@pytest.mark.parametrize(
    ("output", "fix"),
    [
        ("WARNING: Retrying NewConnectionError\nERROR: No matching distribution", "the network"),
        ("OSError: [Errno 28] No space left on device", "free some space"),
        ("ERROR: No matching distribution found for jiter==1", "requirements.txt"),
        ("ERROR: first\nERROR: last", "ERROR: last"),
        ("noise", "pip failed"),
    ],
)
def test_pips_failure_is_one_line_with_the_fix(tmp_path: Path, output: str, fix: str) -> None:
    reason = Pip("3.12", tmp_path / "pip.txt")._reason(output)
    assert fix in reason and "\n" not in reason


def bundle(folder: Path, limit: int = 1000) -> Manifest:
    """A bundle of one small piece, in parts of `limit` bytes."""
    folder.mkdir()
    piece = folder.parent / "piece.whl"
    piece.write_bytes(os.urandom(2500))
    whole = folder.parent / "bundle.tar"
    with tarfile.open(whole, "w") as tar:
        tar.add(piece, piece.name)
    parts = _parts.split(whole, folder, limit)
    manifest = Manifest(
        _parts.seal(whole), parts, (_parts.seal(piece),), {"vllm": "1"}, "3.11", "2", "abc"
    )
    _parts.write_manifest(manifest, folder)
    whole.unlink()
    return manifest


def test_parts_join_to_what_was_split(tmp_path: Path) -> None:
    manifest = bundle(tmp_path / "parts")
    assert len(manifest.parts) > 2
    assert {part.bytes for part in manifest.parts[:-1]} == {1000}
    assert _parts.read_manifest(tmp_path / "parts") == manifest
    into = tmp_path / "into"
    into.mkdir()
    [file] = _install.unpacked(manifest, tmp_path / "parts", into)
    assert file.read_bytes() == (tmp_path / "piece.whl").read_bytes()


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    manifest = bundle(tmp_path / "parts")
    (tmp_path / "parts" / "part-01").unlink()
    with pytest.raises(KitError, match="lacks part-01"):
        _parts.join(manifest, tmp_path / "parts", tmp_path / "whole")


def test_a_damaged_part_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    manifest = bundle(tmp_path / "parts")
    part = tmp_path / "parts" / "part-02"
    part.write_bytes(bytes(part.stat().st_size))
    with pytest.raises(KitError, match="damaged on its way: part-02"):
        _parts.join(manifest, tmp_path / "parts", tmp_path / "whole")
    assert not list(tmp_path.glob("whole*"))


def test_parts_of_two_bundles_are_told(tmp_path: Path) -> None:
    manifest = bundle(tmp_path / "parts")
    other = Manifest(**{**vars(manifest), "whole": Sealed("bundle.tar", 1, "0")})
    with pytest.raises(KitError, match="of different bundles"):
        _parts.join(other, tmp_path / "parts", tmp_path / "whole")
    assert not list(tmp_path.glob("whole*"))


@pytest.mark.parametrize(
    ("text", "fix"), [(None, "scripts/gpu/bundle"), ("{}", "is damaged"), ("[1", "is damaged")]
)
def test_a_bundle_without_a_good_manifest_is_refused(
    tmp_path: Path, text: str | None, fix: str
) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(KitError, match=fix):
        _parts.read_manifest(tmp_path)


def test_parts_replace_the_old_ones_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "part-07").write_text("of before")
    piece = tmp_path / "vllm-1-py3-none-any.whl"
    piece.write_text("piece")
    manifest = _bundle.write_parts(folder, [piece], {"vllm": "1"}, "3.12")
    assert sorted(f.name for f in folder.iterdir()) == ["manifest.json", "part-00"]
    assert manifest.pieces == (_parts.seal(piece),)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["parts", piece.name]


def test_the_summary_names_sizes_and_the_next_command(tmp_path: Path) -> None:
    told = _bundle.summary(bundle(tmp_path / "parts"), tmp_path / "parts")
    assert "parts, 0.0 MiB, for Python 3.11" in told
    assert "piece.whl" in told
    assert told.splitlines()[-1].startswith("next, on the GPU machine: scripts/gpu/install")


def test_a_bundle_for_another_python_is_refused(tmp_path: Path) -> None:
    manifest = bundle(tmp_path / "parts")
    _parts.write_manifest(Manifest(**{**vars(manifest), "python": "3.3"}), tmp_path / "parts")
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    with pytest.raises(KitError, match=f"scripts/gpu/bundle --python {running}"):
        _install.install(tmp_path / "parts", tmp_path / "env", True)
    assert not (tmp_path / "env").exists()


def test_a_folder_of_somebody_else_is_not_cleared(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    with pytest.raises(KitError, match="--into"):
        _install.make_environment(tmp_path)
    assert (tmp_path / "precious").exists()


def test_the_environment_sees_this_python_behind_its_own(tmp_path: Path) -> None:
    into = tmp_path / "env"
    _install.make_environment(into)
    (_install.packages(into) / "hypothesis.py").write_text("ours = True\n")
    code = "import hypothesis, pytest; print(hypothesis.ours, pytest.__version__)"
    assert _install.python(into, code) == (0, f"True {pytest.__version__}\n")
    _install.make_environment(into)  # an unfinished one is replaced
    assert not (_install.packages(into) / "hypothesis.py").exists()


def test_a_finished_install_is_recognised(tmp_path: Path) -> None:
    manifest = bundle(tmp_path / "parts")
    into = tmp_path / "env"
    (into / "bin").mkdir(parents=True)
    (into / "bin" / "python").touch()
    key = _install.fingerprint(tmp_path / "parts", True)
    assert not _install.finished(into, key)
    _install.record(into, manifest, [_install.Check("server", "ok", "", 1.0)], key)
    assert _install.finished(into, key)
    assert _install.install(tmp_path / "parts", into, True) == 0
    assert not _install.finished(into, _install.fingerprint(tmp_path / "parts", False))
    assert json.loads((into / "installed.json").read_text())["checks"][0]["outcome"] == "ok"


def test_a_program_that_hangs_is_ended(tmp_path: Path) -> None:
    code = "import subprocess, time; subprocess.Popen(['sleep', '73']); time.sleep(73)"
    status, output = _install.run([sys.executable, "-c", code], 1)
    assert (status, output) == (1, "no end after 1 s")


@pytest.mark.parametrize(
    ("output", "outcome"),
    [
        ("", "ok"),
        ("cumem_allocator libcuda.so.1: cannot open shared object file", "absent"),
        ("a libcuda.so.1: cannot open\nspinloop: undefined symbol: x", "FAILED"),
    ],
)
def test_a_library_that_lacks_only_the_driver_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, outcome: str
) -> None:
    monkeypatch.setattr(_install, "python", lambda into, code: (0, output))
    assert _install.libraries(tmp_path)[0] == outcome


def test_another_torch_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = bundle(tmp_path / "parts")
    found = {"vllm": "1", "maestro-mas": "0", "torch": "3"}
    monkeypatch.setattr(_install, "python", lambda *call: (0, json.dumps(found)))
    assert _install.versions(tmp_path, manifest) == ("FAILED", "torch 3 for 2")


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("a.hpp:13:10: fatal error: cuda.h: No such file\nERROR: Failed", "cuda.h"),
        ("a.cpp:3:1: error: no type\nerror: subprocess-exited-with-error", "no type"),
        ("noise\nERROR: not a wheel", "not a wheel"),
        ("only this", "only this"),
    ],
)
def test_the_compilers_word_is_told_first(output: str, told: str) -> None:
    assert told in _install.reason(output)


@pytest.mark.parametrize(
    ("failed", "status"),
    [((), 0), (("kvcached",), 0), (("server",), 1), (("kvcached", "server"), 1)],
)
def test_a_kvcached_that_does_not_build_keeps_nothing_else_from_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], failed: tuple[str, ...], status: int
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    manifest = Manifest(Sealed("bundle.tar", 1, "0"), (), (), {}, "3.12", "2.11.0", "abc")
    checks = [
        _install.Check(name, _install.FAILED if name in failed else _install.OK, "", 0.0)
        for name in ("kvcached", "server")
    ]
    assert _install.concluded(tmp_path, manifest, checks, "key") == status
    assert _install.finished(tmp_path, "key") is (status == 0)
    assert all(name in capsys.readouterr().err for name in failed[:1])
