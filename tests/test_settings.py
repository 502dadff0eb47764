"""Settings come from the environment, and a wrong one is told by its name."""

from pathlib import Path

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


@pytest.mark.parametrize(
    "variable",
    [
        *("HOME", "HOST", "DAGSTER_PORT", "MLFLOW_PORT", "GATEWAY_PORT", "ARTIFACTS_URL", "LEDGER_URL"),
        *("TRAFFIC_URL", "DEVICE_SECOND_PRICE", "FLEET_DEVICE_SECONDS", "FLEET_MONEY", "ALERT_WEBHOOK"),
        *("SENSOR_SECONDS", "REQUEST_SECONDS", "KV_CACHE_MB", "PREFIX_CACHE_MB", "MLFLOW_URI", "ENGINE"),
        *("VLLM_URLS", "VLLM_API_KEY"),
    ],
)
def test_empty_is_like_not_set(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.delenv(f"EVERGREEN_{variable}", raising=False)
    default = Settings.from_env()
    monkeypatch.setenv(f"EVERGREEN_{variable}", "")
    assert Settings.from_env() == default


@pytest.mark.parametrize(
    ("variable", "value", "setting"),
    [
        ("LEDGER_URL", "sqlite:///ledger.db", "sqlite:///{here}/ledger.db"),
        ("TRAFFIC_URL", "sqlite+pysqlite:///a/b.db?timeout=5", "sqlite+pysqlite:///{here}/a/b.db?timeout=5"),
        ("MLFLOW_URI", "sqlite:///./mlflow.db", "sqlite:///{here}/mlflow.db"),
        ("LEDGER_URL", "sqlite:////data/ledger.db", "sqlite:////data/ledger.db"),
        ("LEDGER_URL", "postgresql://u:p@h/a", "postgresql://u:p@h/a"),
        ("MLFLOW_URI", "http://h:5000", "http://h:5000"),
        ("ARTIFACTS_URL", "store", "{here}/store"),
        ("ARTIFACTS_URL", "file://store", "{here}/store"),
        ("ARTIFACTS_URL", "/data/store", "/data/store"),
        ("ARTIFACTS_URL", "file:///data/store", "file:///data/store"),
        ("ARTIFACTS_URL", "s3://bucket/store", "s3://bucket/store"),
    ],
)
def test_programs_in_other_folders_find_the_same_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, value: str, setting: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(f"EVERGREEN_{variable}", value)
    assert getattr(Settings.from_env(), variable.lower()) == setting.format(here=tmp_path)


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("GATEWAY_PORT", "²", "a port number from 1 to 65535"),
        ("DAGSTER_PORT", "0", "a port number from 1 to 65535"),
        ("MLFLOW_PORT", "65536", "a port number from 1 to 65535"),
        ("GATEWAY_PORT", "9" * 5000, "a port number from 1 to 65535"),
        ("SENSOR_SECONDS", "٣", "a whole number from 1"),
        ("KV_CACHE_MB", "0", "a whole number from 1"),
        ("FLEET_MONEY", "-1", "a number from 0"),
        ("DEVICE_SECOND_PRICE", "cheap", "a number from 0"),
    ],
)
def test_a_wrong_number_is_told(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, expected: str
) -> None:
    monkeypatch.setenv(f"EVERGREEN_{variable}", value)
    with pytest.raises(ValueError, match=rf"EVERGREEN_{variable}='.*': expected {expected}"):
        Settings.from_env()
