"""The demonstration of a migration: its project loads, and its report says what moved."""

import contextlib
import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace

import dagster as dg
import pytest

from examples.base_revisions.migration import run
from examples.base_revisions.migration.definitions import defs
from examples.base_revisions.migration.run import FOLLOWED, PAGE, Migration, Moved, quality, report
from ml_assets.adapters.rungs import Climb, RungResult
from ml_assets.artifacts import ArtifactStore, canonical_json
from ml_assets.cli.supervisor import OperationError
from ml_assets.decisions.book import DecisionBook
from ml_assets.decisions.records import Decision
from ml_assets.endpoints.ledger import Ledger, Release
from ml_assets.settings import Settings

RELEASE = Release("commands", "base@000000000000", "b" * 64, "a" * 64, "c" * 64, "1", "", "", "")


def test_the_project_is_whole(monkeypatch, tmp_path):
    monkeypatch.setenv(FOLLOWED, str(tmp_path / "followed"))
    repository = defs().get_repository_def()
    keys = repository.asset_graph.get_all_asset_keys()
    assert {PAGE, dg.AssetKey(["commands", "endpoint"]), dg.AssetKey(["topics", "endpoint"])} <= keys
    assert "base_updates" in {sensor.name for sensor in repository.sensor_defs}


def test_the_report_tells_what_moved_and_what_it_saved(capsys):
    rungs = (
        RungResult("copy", "copy", "reject", "", evaluation_seconds=20.0, looks=2),
        RungResult("tune", "copy", "promote", "", training_seconds=5.0, evaluation_seconds=5.0, looks=2),
    )
    climb = Climb("c" * 64, "commands", "base@1", "d" * 64, "base@0", "e" * 64, rungs, 120.0)
    after = dataclasses.replace(RELEASE, base_revision="base@111111111111")
    moved = [
        Moved("commands", RELEASE, after, 93.4, {"before": 0.9, "after": 0.875, "bare": 0.01}, climb),
        Moved("topics", RELEASE, after, 120.0),
    ]
    urls = {name: f"http://{name}" for name in ("dagster", "mlflow", "gateway")}
    report(moved, "/data/page.html", urls, print)
    text = capsys.readouterr().out
    assert "| commands | tune | 90.0% | 87.5% | 1.0% | 30 | 120 | 0.75 | 93 s |" in text
    assert "| topics | - | - | - | - | - | - | - | 120 s |" in text
    assert "S = 1 - 30 / 120 = 0.75" in text
    assert "Migration page: /data/page.html" in text
    assert "http://dagster/assets/fleet/migration_plan" in text


def test_quality_comes_from_the_report(tmp_path):
    store = ArtifactStore(str(tmp_path / "artifacts"))
    arms = {
        name: {"metrics": {"accuracy": {"mean": value}}}
        for name, value in {"zero_shot": 0.2, "few_shot": 0.4, "adapter": 0.8, "champion": 0.9}.items()
    }
    summary = {"arms": arms, "metric": "accuracy"}
    ref = store.publish("eval_report", {"summary.json": canonical_json(summary)})
    assert quality(store, ref.digest) == {"before": 0.9, "after": 0.8, "bare": 0.4}
    assert quality(store, "f" * 64) == {}


@pytest.mark.parametrize("name", ["commands", "topics"])
def test_both_customizations_follow_the_directory(name, monkeypatch, tmp_path):
    monkeypatch.setenv(FOLLOWED, str(tmp_path))
    graph = defs().get_repository_def().asset_graph
    parents = graph.get(dg.AssetKey([name, "adapter"])).parent_keys
    assert dg.AssetKey(["base_model"]) in parents


# -- a home with a past ----------------------------------------------------------------------------------


@pytest.fixture
def book(evergreen_home) -> Iterator[DecisionBook]:
    """Of a home where `commands` and `topics` are served on the base."""
    with contextlib.closing(Ledger(Settings.from_env().ledger_url)) as ledger:
        for name in ("commands", "topics"):
            serve(ledger, name, "base@000000000000")
        yield DecisionBook(ledger)


def serve(ledger: Ledger, name: str, revision: str) -> None:
    with ledger.release_transaction(name, "") as transaction:
        transaction.record(dataclasses.replace(RELEASE, customization=name, base_revision=revision))


def decide(book: DecisionBook, name: str, revision: str, *steps: str, attempt: int = 1) -> None:
    evidence = f"base-{revision}-x"
    decision = Decision(
        name,
        "migrate",
        "to_do",
        "new base",
        "",
        evidence,
        "d" * 64,
        "a" * 64,
        "p",
        base_revision=revision,
        attempt=attempt,
    )
    book.record(decision)
    for step in steps:
        name_of, _, detail = step.partition(" ")
        book.step(decision.id, name_of, detail)


def climbed(name: str, key: str, seconds: float) -> Climb:
    rung = RungResult("copy", "copy", "promote", key, evaluation_seconds=seconds)
    return Climb(key * 64, name, "base@2", "d" * 64, "base@1", "e" * 64, (rung,), 100.0)


def migration() -> Migration:
    specs = [SimpleNamespace(name="commands"), SimpleNamespace(name="topics")]
    return Migration(Settings.from_env(), specs, lambda _: None)  # type: ignore[arg-type]


def test_only_what_comes_after_the_publication_counts(book, monkeypatch):
    decide(book, "commands", "base@1", "failed")
    decide(book, "topics", "base@1", "judged reject", "succeeded reject")
    book.record_climb(climbed("commands", "1", 50.0))
    watched = migration()
    assert watched._tell() is None and watched.stay == set()

    def next_second(_: float) -> None:
        decide(book, "commands", "base@2", "judged promote", "succeeded promote")
        decide(book, "topics", "base@2", "judged undecided", "succeeded undecided")
        book.record_climb(climbed("commands", "2", 20.0))
        with contextlib.closing(Ledger(Settings.from_env().ledger_url)) as ledger:
            serve(ledger, "commands", "base@2")

    monkeypatch.setattr(run.time, "sleep", next_second)
    moved = watched.watch()
    assert [one.name for one in moved] == ["commands"] and watched.stay == {"topics"}
    assert moved[0].climb is not None and moved[0].climb.seconds == 20.0


def test_the_newest_climb_of_a_migration_is_the_one_that_is_shown(book, monkeypatch):
    watched = migration()

    def next_second(_: float) -> None:
        for key, seconds in (("1", 50.0), ("2", 20.0)):
            book.record_climb(climbed("commands", key, seconds))
        with contextlib.closing(Ledger(Settings.from_env().ledger_url)) as ledger:
            serve(ledger, "commands", "base@2")
            serve(ledger, "topics", "base@2")

    monkeypatch.setattr(run.time, "sleep", next_second)
    climb = watched.watch()[0].climb
    assert climb is not None and climb.seconds == 20.0


def test_an_attempt_that_is_made_again_stops_nothing(book):
    watched = migration()
    decide(book, "commands", "base@2", "failed")
    decide(book, "commands", "base@2", attempt=2)
    assert watched._tell() is None
    decide(book, "commands", "base@2", "gave_up", attempt=2)
    assert watched._tell() == "commands gave_up"
    with pytest.raises(OperationError, match="commands gave_up"):
        watched.watch()


def test_a_home_where_it_ran_is_left_as_it_is(book, monkeypatch, capsys):
    settings = Settings.from_env()
    followed = settings.home / "followed" / run.FAMILY
    followed.parent.mkdir()
    followed.symlink_to(f".{followed.name}-minor-0123")
    for name in (run.FOLLOWED, run.MODULE_VARIABLE, "EVERGREEN_SENSOR_SECONDS"):
        monkeypatch.setenv(name, "5")
    monkeypatch.setattr(run, "make", lambda *_, **__: pytest.fail("made"))
    monkeypatch.setattr(run, "publish", lambda *_: pytest.fail("published"))
    assert run.main() == 0
    text = capsys.readouterr().out
    assert "commands is served on base@000000000000" in text
    assert "MIGRATION_HOME" in text and f"make down EVERGREEN_HOME={settings.home}" in text


def test_a_port_that_is_taken_is_told_before_anything_is_made(evergreen_home, monkeypatch, capsys):
    for name in (run.FOLLOWED, run.MODULE_VARIABLE, "EVERGREEN_SENSOR_SECONDS"):
        monkeypatch.setenv(name, "5")
    monkeypatch.setenv("EVERGREEN_DAGSTER_PORT", "8000")
    monkeypatch.setenv("EVERGREEN_GATEWAY_PORT", "8000")
    monkeypatch.setattr(run, "make", lambda *_, **__: pytest.fail("made"))
    assert run.main() == 1
    assert "both 8000" in capsys.readouterr().err
