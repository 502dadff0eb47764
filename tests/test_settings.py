"""Settings come from the environment, and a wrong one is told by its name."""

import httpx
import pytest

from ml_assets.settings import Settings


def test_the_engine_and_its_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.from_env()
    assert (settings.engine, settings.vllm_urls, settings.vllm_api_key) == ("in_process", (), None)
    monkeypatch.setenv("EVERGREEN_ENGINE", "vllm")
    monkeypatch.setenv("EVERGREEN_VLLM_URLS", " http://gpu-1:8000/, http://gpu-2:8000/v1,,http://gpu-1:8000")
    monkeypatch.setenv("EVERGREEN_VLLM_API_KEY", "a secret")
    settings = Settings.from_env()
    assert settings.engine == "vllm"
    assert settings.vllm_urls == ("http://gpu-1:8000", "http://gpu-2:8000")
    assert settings.vllm_api_key == "a secret" and "a secret" not in repr(settings)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"EVERGREEN_ENGINE": "tgi"}, r"EVERGREEN_ENGINE='tgi': expected in_process or vllm"),
        ({"EVERGREEN_ENGINE": "vllm"}, r"expected the servers' URLs in EVERGREEN_VLLM_URLS"),
        ({"EVERGREEN_VLLM_URLS": "gpu-1:8000"}, r"EVERGREEN_VLLM_URLS='gpu-1:8000': expected http"),
    ],
)
def test_a_wrong_engine_is_told(monkeypatch: pytest.MonkeyPatch, values: dict[str, str], says: str) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=says):
        Settings.from_env()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_a_url_is_one_whatever_the_address(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setenv("EVERGREEN_HOST", host)
    settings = Settings.from_env()
    urls = [httpx.URL(url) for url in (settings.dagster_url, settings.mlflow_url, settings.gateway_url)]
    assert [(url.host, url.port) for url in urls] == [(host, 3000), (host, 5000), (host, 8000)]
