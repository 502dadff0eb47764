"""Temporary deployments of this project, and the servers that benchmarks start."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import httpx

from benchmarks.common import Unavailable, environment, kill, last_line
from ml_assets.cli import supervisor
from ml_assets.settings import Settings

STATE = tuple(f"EVERGREEN_{name}" for name in ("ARTIFACTS_URL", "LEDGER_URL", "TRAFFIC_URL", "MLFLOW_URI"))
"""Variables that lead out of EVERGREEN_HOME: a deployment of its own must not inherit them."""


def prepare_home(home: Path, cache: Path) -> Settings:
    """Settings of a deployment of its own in `home`, on free ports. It shares downloads, the converted base
    in `cache`, and what is known of the machine with the one that the environment names."""
    here = Settings.from_env()
    home.mkdir(parents=True, exist_ok=True)
    here.downloads.mkdir(parents=True, exist_ok=True)
    if not (home / "downloads").exists():
        (home / "downloads").symlink_to(here.downloads)
    for kind in ("base_model", "index/base_model"):
        source, target = cache / "artifacts" / kind, home / "artifacts" / kind
        if source.exists() and not target.exists():
            shutil.copytree(source, target, copy_function=os.link)  # artifacts never change
    if (here.home / "hardware.json").exists():
        shutil.copy(here.home / "hardware.json", home)
    dagster_port, mlflow_port, gateway_port = free_ports(3)
    return replace(
        here,
        home=home,
        dagster_port=dagster_port,
        mlflow_port=mlflow_port,
        gateway_port=gateway_port,
        artifacts_url=str(home / "artifacts"),
        ledger_url=f"sqlite:///{home / 'ledger.db'}",
        traffic_url=f"sqlite:///{home / 'traffic.db'}",
        mlflow_uri=f"sqlite:///{home / 'mlflow' / 'mlflow.db'}",
    )


def deployment_environment(settings: Settings) -> dict[str, str]:
    """What a program of this deployment needs, beside `benchmarks.common.environment`."""
    whole = supervisor.environment(settings)
    return {name: value for name, value in whole.items() if name.startswith("EVERGREEN_")}


class Server:
    """A program that answers over HTTP, in a session of its own, from when `ready` answers with 200."""

    def __init__(self, command: Sequence[str], ready: str, log: Path, extra: Mapping[str, str] | None = None):
        log.parent.mkdir(parents=True, exist_ok=True)
        self.ready = ready
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                list(command),
                cwd=log.parent,
                env=environment(**(extra or {})),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def wait(self, seconds: float) -> None:
        """Until it is ready. Raises Unavailable with the last line of its log when it won't be."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(self.ready, timeout=5, trust_env=False).status_code == 200:
                    return
            time.sleep(0.2)
        raise Unavailable(f"the server is not ready: {last_line(self.log)}")

    def close(self) -> None:
        kill(self.process)


def gateway(settings: Settings, log: Path, extra: Mapping[str, str] | None = None) -> Server:
    """This project's gateway program, with `extra` variables."""
    command = [sys.executable, "-m", "ml_assets.endpoints.gateway"]
    environment = deployment_environment(settings) | dict(extra or {})
    return Server(command, f"{settings.gateway_url}/healthz/ready", log, environment)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def changed_environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """This process's own environment, for what it starts through the project's functions."""
    before = dict(os.environ)
    os.environ.update(wanted)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
