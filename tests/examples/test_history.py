"""The replayed history: its project loads, and its report says what happened."""

from pathlib import Path

import dagster as dg
import pytest

from examples.home_commands.history.definitions import defs
from examples.home_commands.history.picture import draw
from examples.home_commands.history.replay import NAME, PHASES, Event, History, Turn, describe, report
from ml_assets.settings import Settings


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
        history.turns.append(Turn(0, row, adapter=adapter, right=i < 50 or i >= 60))
    without = [i < 50 for i in range(100)]
    urls = {name: f"http://{name}" for name in ("dagster", "mlflow", "gateway")}
    report(Settings.from_env(), history, without, urls, print)
    text = capsys.readouterr().out
    assert "| 1 to 50 | 100% | 100% | old commands |" in text
    assert "| 51 to 100 | 80% | 0% | incremental update, adapter c0ffeec0 promoted |" in text
    assert "  de: 100% against 0% of 20\n  en: 100% against 0% of 20\n" in text
    assert (tmp_path / "demo-drift" / "accuracy.png").stat().st_size > 10_000
    assert "http://dagster/assets/voice/decision" in text


def test_a_picture_without_events(tmp_path: Path) -> None:
    path = draw(tmp_path / "x.png", [(0, 50)], [1.0], [0.5], [])
    assert path.read_bytes().startswith(b"\x89PNG")
    assert describe(Event(3, "full_retrain", "decision")) == "full retrain"
