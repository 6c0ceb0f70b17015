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
        ("MAESTRO_SEND_CONTENT", "some", "true or false"),
        ("MAESTRO_FALLBACK_BASE_URL", "api.openai.com", "https://api.openai.com/v1"),
    ],
)
def test_bad_values_name_the_fix(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, fix: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=name) as caught:
        settings()
    assert fix in str(caught.value)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_the_names_of_the_loopback_host_are_one(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    for other in ("localhost", "127.0.0.1", "[::1]"):
        monkeypatch.setenv("MAESTRO_BASE_URL", f"http://{other}:8000/v1")
        assert is_maestro(f"http://{host}:8000/v1")
        assert not is_maestro(f"http://{host}:8001/v1")
        assert not is_maestro(f"https://{host}:8000/v1")


def test_a_fallback_is_any_other_openai_server(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings().fallback_base_url is None
    monkeypatch.setenv("MAESTRO_BASE_URL", "http://localhost:8000/v1")
    monkeypatch.setenv("MAESTRO_FALLBACK_BASE_URL", "https://api.groq.com/openai/v1/")
    monkeypatch.setenv("MAESTRO_FALLBACK_API_KEY", "secret")
    assert settings().fallback_base_url == "https://api.groq.com/openai/v1"
    assert settings().fallback_api_key == "secret"
    monkeypatch.setenv("MAESTRO_FALLBACK_BASE_URL", "http://127.0.0.1:8000/v1")
    with pytest.raises(ConfigError, match="name another one"):
        settings()


def test_content_is_sent_only_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not settings().send_content
    monkeypatch.setenv("MAESTRO_SEND_CONTENT", "1")
    assert settings().send_content
