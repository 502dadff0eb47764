"""Where this deployment keeps its state and listens: read from the environment, in one place.

| variable | default | meaning |
| --- | --- | --- |
| `EVERGREEN_HOME` | `.evergreen` | all state: artifacts, databases, logs, downloads |
| `EVERGREEN_HOST` | `127.0.0.1` | address that the servers bind to |
| `EVERGREEN_DAGSTER_PORT` | `3000` | Dagster UI |
| `EVERGREEN_MLFLOW_PORT` | `5000` | MLflow UI |
| `EVERGREEN_GATEWAY_PORT` | `8000` | OpenAI-compatible endpoint |
| `EVERGREEN_ARTIFACTS_URL` | `<home>/artifacts` | fsspec URL of the artifact store |
| `EVERGREEN_LEDGER_URL` | `sqlite:///<home>/ledger.db` | SQLAlchemy URL of the ledger and the API keys |
| `EVERGREEN_TRAFFIC_URL` | `sqlite:///<home>/traffic.db` | SQLAlchemy URL of the requests and the feedback |
| `EVERGREEN_DEVICE_SECOND_PRICE` | `0` | price of a second of training or evaluation |
| `EVERGREEN_FLEET_DEVICE_SECONDS` | | device seconds a month for all maintenance |
| `EVERGREEN_FLEET_MONEY` | | the same in money |
| `EVERGREEN_ALERT_WEBHOOK` | | URL that gets alerts as JSON |
| `EVERGREEN_SENSOR_SECONDS` | `30` | between two ticks of the sensor that looks at the traffic |
| `EVERGREEN_REQUEST_SECONDS` | `300` | time that a request to the gateway may take, waiting included |
| `EVERGREEN_KV_CACHE_MB` | `2048` | keys and values of the requests under way on one base, in the gateway |
| `EVERGREEN_PREFIX_CACHE_MB` | `512` | those of system prompts and other beginnings kept for later requests |
| `EVERGREEN_MLFLOW_URI` | `sqlite:///<home>/mlflow/mlflow.db` | MLflow tracking and registry store |
| `EVERGREEN_ENGINE` | `in_process` | what answers for endpoints that name no engine: `in_process` or `vllm` |
| `EVERGREEN_VLLM_URLS` | | vLLM servers, separated by commas: each replica's own URL |
| `EVERGREEN_VLLM_API_KEY` | | the key that they were started with, if any |
| `EVERGREEN_THREADS` | all cores | most threads that a process computes with |
| `EVERGREEN_DTYPE` | the faster one | number format of all computing: `bfloat16` or `float32` |
"""

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

EngineName = Literal["in_process", "vllm"]

RUN_ASSETS_VARIABLE = "EVERGREEN_RUN_ASSETS"
"""Set by the launcher for the process of a run: what its assets belong to, separated by commas."""


@dataclass(frozen=True)
class Settings:
    """Locations and ports of one deployment. Paths are absolute, also in URLs: its programs may have other
    working directories."""

    home: Path
    host: str
    dagster_port: int
    mlflow_port: int
    gateway_port: int
    artifacts_url: str
    ledger_url: str
    traffic_url: str
    mlflow_uri: str
    device_second_price: float
    fleet_device_seconds: float | None
    fleet_money: float | None
    alert_webhook: str | None = field(repr=False)
    sensor_seconds: int
    request_seconds: int
    kv_cache_bytes: int
    prefix_cache_bytes: int
    engine: EngineName
    vllm_urls: tuple[str, ...]
    vllm_api_key: str | None = field(repr=False)

    @classmethod
    def from_env(cls) -> "Settings":
        """Read the environment; an empty variable is like one that is not set.

        Raises ValueError that names the variable and what was expected: a port from 1 to 65535, a limit from
        1, an engine that exists (vllm only with URLs), URLs that are http or https.
        """
        home = Path(_text("EVERGREEN_HOME", ".evergreen")).expanduser().resolve()
        return cls(
            home=home,
            host=_text("EVERGREEN_HOST", "127.0.0.1"),
            dagster_port=_port("EVERGREEN_DAGSTER_PORT", 3000),
            mlflow_port=_port("EVERGREEN_MLFLOW_PORT", 5000),
            gateway_port=_port("EVERGREEN_GATEWAY_PORT", 8000),
            artifacts_url=_location("EVERGREEN_ARTIFACTS_URL", str(home / "artifacts")),
            ledger_url=_location("EVERGREEN_LEDGER_URL", f"sqlite:///{home / 'ledger.db'}"),
            traffic_url=_location("EVERGREEN_TRAFFIC_URL", f"sqlite:///{home / 'traffic.db'}"),
            mlflow_uri=_location("EVERGREEN_MLFLOW_URI", f"sqlite:///{home / 'mlflow' / 'mlflow.db'}"),
            device_second_price=_number("EVERGREEN_DEVICE_SECOND_PRICE") or 0.0,
            fleet_device_seconds=_number("EVERGREEN_FLEET_DEVICE_SECONDS"),
            fleet_money=_number("EVERGREEN_FLEET_MONEY"),
            alert_webhook=os.environ.get("EVERGREEN_ALERT_WEBHOOK") or None,
            sensor_seconds=_limit("EVERGREEN_SENSOR_SECONDS", 30),
            request_seconds=_limit("EVERGREEN_REQUEST_SECONDS", 300),
            kv_cache_bytes=_limit("EVERGREEN_KV_CACHE_MB", 2048) * 2**20,
            prefix_cache_bytes=_limit("EVERGREEN_PREFIX_CACHE_MB", 512) * 2**20,
            engine=_engine(),
            vllm_urls=_vllm_urls(),
            vllm_api_key=os.environ.get("EVERGREEN_VLLM_API_KEY") or None,
        )

    @property
    def downloads(self) -> Path:
        """Packages fetched by requirement (wheels)."""
        return self.home / "downloads"

    @property
    def checkpoints(self) -> Path:
        """Unfinished trainings, one folder per input key."""
        return self.home / "checkpoints"

    @property
    def artifact_cache(self) -> Path:
        """Local copies of artifacts whose store is remote."""
        return self.home / "cache" / "artifacts"

    @property
    def refs(self) -> Path:
        """Which artifact each asset (and partition) last gave."""
        return self.home / "refs"

    @property
    def locks(self) -> Path:
        """Lock files between the processes of this deployment."""
        return self.home / "locks"

    @property
    def dagster_home(self) -> Path:
        return self.home / "dagster"

    @property
    def mlflow_artifacts(self) -> Path:
        return self.home / "mlflow" / "artifacts"

    @property
    def logs(self) -> Path:
        return self.home / "logs"

    @property
    def dagster_url(self) -> str:
        return self._url(self.dagster_port)

    @property
    def mlflow_url(self) -> str:
        return self._url(self.mlflow_port)

    @property
    def gateway_url(self) -> str:
        return self._url(self.gateway_port)

    def _url(self, port: int) -> str:
        return f"http://[{self.host}]:{port}" if ":" in self.host else f"http://{self.host}:{port}"


def _text(variable: str, default: str) -> str:
    return os.environ.get(variable) or default


def _location(variable: str, default: str) -> str:
    """A path or URL; that of a relative file is made absolute."""
    url = re.sub(r"^file://(?=[^/])", "", _text(variable, default))
    if sqlite := re.fullmatch(r"(sqlite(?:\+\w+)?:///)([^/:?][^?]*)(\?.*)?", url):
        start, path, parameters = sqlite.groups("")
        return url if path.startswith("file:") else f"{start}{Path(path).resolve()}{parameters}"
    # a scheme, or the first of a chain of file systems
    return url if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", url) else str(Path(url).expanduser().resolve())


def _limit(variable: str, default: int) -> int:
    text = _text(variable, str(default))
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise ValueError(f"{variable}={text!r}: expected a whole number from 1")
    return int(text)


def _number(variable: str) -> float | None:
    text = os.environ.get(variable) or None
    if text is None:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{variable}={text!r}: expected a number from 0")
    return number


def _port(variable: str, default: int) -> int:
    text = _text(variable, str(default))
    if not re.fullmatch(r"[0-9]{1,9}", text) or not 1 <= int(text) <= 65535:
        raise ValueError(f"{variable}={text!r}: expected a port number from 1 to 65535")
    return int(text)


def _engine() -> EngineName:
    text = _text("EVERGREEN_ENGINE", "in_process")
    for name in get_args(EngineName):
        if text == name:
            if name == "vllm" and not _vllm_urls():
                raise ValueError("EVERGREEN_ENGINE='vllm': expected the servers' URLs in EVERGREEN_VLLM_URLS")
            return name
    raise ValueError(f"EVERGREEN_ENGINE={text!r}: expected {' or '.join(get_args(EngineName))}")


def _vllm_urls() -> tuple[str, ...]:
    text = os.environ.get("EVERGREEN_VLLM_URLS", "")
    urls = [url.strip().rstrip("/").removesuffix("/v1") for url in text.split(",") if url.strip()]
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"EVERGREEN_VLLM_URLS={text!r}: expected http(s) URLs separated by commas")
    return tuple(dict.fromkeys(urls))
