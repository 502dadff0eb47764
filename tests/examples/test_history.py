"""The replayed history: its project loads, and its report says what happened."""

import contextlib
from pathlib import Path

import dagster as dg
import httpx
import pytest

from examples.demonstration import demonstrate
from examples.home_commands.history import replay
from examples.home_commands.history.definitions import defs
from examples.home_commands.history.picture import draw
from examples.home_commands.history.replay import NAME, PHASES, Event, History, Turn, describe, report
from ml_assets.cli.supervisor import OperationError
from ml_assets.downloads import DownloadError
from ml_assets.endpoints.ledger import Ledger, Release
from ml_assets.settings import Settings
from ml_assets.traffic.store import TrafficLog


def test_the_project_is_whole() -> None:
    repository = defs().get_repository_def()
    assert dg.AssetKey([NAME, "decision"]) in repository.asset_graph.get_all_asset_keys()
    assert {"drift", "stale_data", "endpoint_health"} <= {sensor.name for sensor in repository.sensor_defs}
    assert len({phase.release for phase in PHASES}) > 1


def test_the_report_tells_the_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EVERGREEN_HOME", str(tmp_path))
    history = History()
    history.happened("phase", "old commands")
    for i in range(100):
        if i == 60:
            history.happened("decision", "incremental_update")
            history.happened("promotion", "c0ffee" * 10)
        adapter = "c0ffee" * 10 if i >= 60 else "a" * 60
        row = {"language": "de" if i % 2 else "en"}
        history.turns.append(Turn(int(i >= 50), row, adapter=adapter, right=i < 50 or i >= 60))
    without = [i < 50 for i in range(100)]
    urls = {name: f"http://{name}" for name in ("dagster", "mlflow", "gateway")}
    report(Settings.from_env(), history, without, urls, print)
    text = capsys.readouterr().out
    assert "| 1 to 50 | 100% | 100% | old commands |" in text
    assert "| 51 to 100 | 80% | 0% | incremental update, adapter c0ffeec0 promoted |" in text
    before = "against 0% of 20; 100% of 25 before the change\n"
    assert f"  de: 100% {before}  en: 100% {before}" in text
    assert (tmp_path / "demo-drift" / "accuracy.png").stat().st_size > 10_000
    assert "http://dagster/assets/voice/decision" in text


def test_a_picture_without_events(tmp_path: Path) -> None:
    path = draw(tmp_path / "x.png", [(0, 50)], [1.0], [0.5], [])
    assert path.read_bytes().startswith(b"\x89PNG")
    assert describe(Event(3, "full_retrain", "decision")) == "full retrain"


def test_a_history_is_lived_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERGREEN_HOME", str(tmp_path / "home"))
    settings = Settings.from_env()
    release = Release(NAME, "base@0", "b" * 64, "a" * 64, "c" * 64, "1", "", "", "")
    with contextlib.closing(Ledger(settings.ledger_url)) as ledger:
        for _ in range(2):
            replay.check_new(settings)
            with ledger.release_transaction(NAME, "") as transaction:
                transaction.record(release)
    with pytest.raises(OperationError, match="has a history of 'voice' already; remove"):
        replay.check_new(settings)


def test_requests_are_a_history_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERGREEN_HOME", str(tmp_path / "home"))
    settings = Settings.from_env()
    replay.check_new(settings)
    with contextlib.closing(TrafficLog(settings.traffic_url)) as log:
        log.append([], {NAME: 3})
    with pytest.raises(OperationError, match="give another one"):
        replay.check_new(settings)


@pytest.mark.parametrize(
    "error", [OperationError("no"), DownloadError("no"), httpx.ConnectError("no"), OSError("no")]
)
def test_what_stops_a_demonstration_is_told_in_a_line(
    error: Exception, evergreen_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    assert demonstrate(Settings.from_env(), fail) == 1
    text = capsys.readouterr().err
    assert text == f"error: no\n`make down EVERGREEN_HOME={evergreen_home}` ends what was started\n"


def test_a_demonstration_that_is_interrupted_says_how_to_end_the_rest(
    evergreen_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    assert demonstrate(Settings.from_env(), interrupt) == 1
    assert "make down" in capsys.readouterr().err
