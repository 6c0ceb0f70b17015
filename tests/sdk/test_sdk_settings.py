import pytest

from maestro_agents import ConfigError
from maestro_agents._settings import is_maestro, settings


def test_unset_environment_means_inactive() -> None:
    assert not settings().active
    assert settings().enabled
    assert not is_maestro("http://127.0.0.1:8000/v1")


def test_it_is_read_when_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAESTRO_BASE_URL", "http://maestro:9000/v1/")
    monkeypatch.setenv("MAESTRO_API_KEY", "secret")
    assert settings().active
    assert settings().base_url == "http://maestro:9000/v1"
    assert settings().control_url == "http://maestro:9000/v1/maestro"
    assert settings().api_key == "secret"
    monkeypatch.setenv("MAESTRO_ENABLED", "off")
    assert not settings().active


@pytest.mark.parametrize(
    ("url", "same"),
    [
        ("http://maestro:80/v1", True),
        ("http://maestro/v1", True),
        ("http://maestro/other/path", True),
        ("http://MAESTRO/v1", True),
        ("https://maestro/v1", False),
        ("http://maestro:8000/v1", False),
        ("http://maestro.example.org/v1", False),
        ("not a url", False),
        ("http://maestro:port/v1", False),
    ],
)
def test_origin_is_scheme_host_and_port(
    monkeypatch: pytest.MonkeyPatch, url: str, same: bool
) -> None:
    monkeypatch.setenv("MAESTRO_BASE_URL", "http://maestro/v1")
    assert is_maestro(url) is same


@pytest.mark.parametrize(
    ("name", "value", "fix"),
    [
        ("MAESTRO_BASE_URL", "127.0.0.1:8000", "http://HOST:PORT/v1"),
        ("MAESTRO_BASE_URL", "http://127.0.0.1:8000", "http://HOST:PORT/v1"),
        ("MAESTRO_BASE_URL", "http://127.0.0.1:x/v1", "http://HOST:PORT/v1"),
        ("MAESTRO_ENABLED", "maybe", "true or false"),
    ],
)
def test_bad_values_name_the_fix(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, fix: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=name) as caught:
        settings()
    assert fix in str(caught.value)
