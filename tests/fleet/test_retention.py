"""Garbage collection never takes what something that stays names, and takes the rest once it is old."""

import datetime
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
from dagster._core.test_utils import create_run_for_test
from hypothesis import given, settings
from hypothesis import strategies as st
from maintenance_world import make_release, make_spec

from ml_assets.adapters.rungs import Climb, RungResult
from ml_assets.artifacts import ArtifactRef, ArtifactStore, Memo, Stored, canonical_json
from ml_assets.cli.main import main
from ml_assets.decisions.book import DecisionBook
from ml_assets.endpoints.ledger import Ledger
from ml_assets.fleet.garbage_job import GarbageConfig, collect_garbage
from ml_assets.fleet.retention import (
    Aliased,
    collect,
    find_garbage,
    find_names,
    release_roots,
    remove,
    sweep,
)
from ml_assets.settings import Settings
from resources.artifact_store import ArtifactRefIOManager
from resources.mlflow_tracking import VersionInfo

NOW = datetime.datetime(2026, 6, 1, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)
OLD = NOW - 90 * DAY


def digest(number: int) -> str:
    return f"{number:064x}"


@given(data=st.data(), size=st.integers(0, 12))
@settings(max_examples=200, deadline=None)
def test_nothing_that_stays_names_what_goes(data: st.DataObject, size: int) -> None:
    numbers = st.integers(0, size)  # one more than there are: names of strangers
    edges = {i: data.draw(st.sets(numbers, max_size=4)) for i in range(size)}
    roots = {digest(i): "a root" for i in data.draw(st.sets(numbers, max_size=3))}
    young = data.draw(st.sets(numbers, max_size=2))
    artifacts = [
        Stored(ArtifactRef("kind", digest(i)), 1, NOW - DAY if i in young else OLD, ()) for i in range(size)
    ]
    noted = data.draw(st.sets(numbers, max_size=4))
    memos = [Memo("kind", str(i), ArtifactRef("kind", digest(i)), {}, OLD) for i in noted]
    found = sweep(
        artifacts, memos, roots, lambda one: {digest(j) for j in edges[int(one.ref.digest, 16)]}, NOW
    )
    reached = {i for i in range(size) if digest(i) in roots or i in young}
    while more := {j for i in reached for j in edges[i] if j < size} - reached:
        reached |= more
    gone = {int(one.ref.digest, 16) for one in found.gone}
    assert gone == set(range(size)) - reached
    assert {int(ref.digest, 16) for ref in found.kept} == reached
    assert {int(memo.input_key) for memo in found.memos} == noted & gone


@given(data=st.data(), size=st.integers(1, 8))
@settings(max_examples=25, deadline=None)
def test_on_a_real_store(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, size: int) -> None:
    """Artifacts that name earlier ones in their JSON files: after a collection everything that a root needs
    can be opened, and nothing else is there; a second collection finds nothing."""
    store = ArtifactStore(str(tmp_path_factory.mktemp("store")))
    refs: list[ArtifactRef] = []
    needs: list[set[int]] = []
    for number in range(size):
        named = data.draw(st.sets(st.integers(0, number - 1), max_size=3)) if number else set()
        body = {"number": number, "deep": [{"parent": refs[i].digest} for i in sorted(named)]}
        files = {"manifest.json": canonical_json(body), "w.bin": b"x" * number, "rows.jsonl": b"{}"}
        refs.append(store.publish(data.draw(st.sampled_from(["adapter", "dataset"])), files))
        needs.append(named)
        store.remember(refs[-1].kind, digest(number), refs[-1], {})
    for path in Path(store.root).rglob("*.json"):
        os.utime(path, (OLD.timestamp(), OLD.timestamp()))
    chosen = data.draw(st.sets(st.integers(0, size - 1), max_size=2))
    reached = set(chosen)
    while more := {j for i in reached for j in needs[i]} - reached:
        reached |= more

    def once() -> list[Stored]:
        artifacts = list(store.stored())
        names, damaged = find_names(store, artifacts)
        assert damaged == set()
        roots = {refs[i].digest: "chosen" for i in chosen}
        found = sweep(artifacts, list(store.memos()), roots, lambda one: names[one.ref], NOW)
        return remove(store, found, 30 * DAY, list)[0]

    assert {one.ref for one in once()} == {refs[i] for i in range(size) if i not in reached}
    for number, ref in enumerate(refs):
        assert store.exists(ref) == (number in reached)
        if number in reached:
            store.open(ref)
        assert (store.recall(ref.kind, digest(number)) is not None) == (number in reached)
    assert once() == [] and len(list(store.memos())) == len(reached)


def test_what_was_found_again_is_used(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))
    ref = store.publish("answers", {"answers.jsonl": b"{}"})
    store.remember("answers", digest(1), ref, {})
    for path in tmp_path.rglob("*.json"):
        os.utime(path, (OLD.timestamp(), OLD.timestamp()))
    now = datetime.datetime.now(datetime.UTC)
    old = sweep(list(store.stored()), list(store.memos()), {}, lambda one: (), now)
    assert [one.ref for one in old.gone] == [ref]
    assert store.recall("answers", digest(1)) is not None  # between looking and removing
    assert remove(store, old, 30 * DAY, list) == ([], ()) and store.exists(ref)


def test_releases_stay_as_long_as_they_can_be_served_again() -> None:
    def row(adapter: str, days_ago: float, **changes: Any) -> Any:
        at = (NOW - days_ago * DAY).isoformat()
        return make_release(adapter=adapter, at=at, report_digest=adapter, base_digest=adapter, **changes)

    rows = [row("new", 10), row("before", 100), row("older", 200), row("oldest", 300)]
    assert set(release_roots(rows, "30d", NOW)) == {"new", "before"}
    assert set(release_roots(rows, "9d", NOW)) == {"new"}
    assert set(release_roots(rows, "150d", NOW)) == {"new", "before", "older"}
    withdrawn = [row("new", 10, action="withdraw"), *rows[1:]]
    assert set(release_roots(withdrawn, "9d", NOW)) == set()
    assert set(release_roots(withdrawn, "30d", NOW)) == {"new", "before"}


class World:
    """A store with two base revisions, an adapter and a report on each; the newer one serves."""

    def __init__(self, home: Path):
        self.home = home
        self.settings = Settings.from_env()
        self.store = ArtifactStore(self.settings.artifacts_url)
        self.ledger = Ledger(self.settings.ledger_url)
        self.references = ArtifactRefIOManager()
        self.revisions = ["tiny@000000000001", "tiny@000000000002"]
        self.dataset = self.store.publish("dataset", {"manifest.json": b"{}"})
        self.made = [self.make(revision) for revision in self.revisions]
        self.stray = self.store.publish("adapter", {"manifest.json": b'{"number": "stray"}'})

    def make(self, revision: str) -> tuple[ArtifactRef, ArtifactRef, ArtifactRef]:
        base = self.store.publish("base_model", {"manifest.json": canonical_json({"revision": revision})})
        body = {"base_revision": revision, "dataset": self.dataset.digest}
        adapter = self.store.publish("adapter", {"manifest.json": canonical_json(body)})
        about = {"candidate": adapter.digest, "base_revision": revision}
        report = self.store.publish("eval_report", {"summary.json": canonical_json({"about": about})})
        for key, ref in (
            (["base_model"], base),
            (["home", "adapter"], adapter),
            (["home", "eval_report"], report),
        ):
            path = self.references._path(dg.AssetKey(key), revision)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"kind": ref.kind, "digest": ref.digest}))
        return base, adapter, report

    def serve(self, index: int) -> None:
        base, adapter, report = self.made[index]
        with self.ledger.release_transaction("home", "run") as tx:
            tx.record(
                make_release(
                    adapter=adapter.digest,
                    base_digest=base.digest,
                    report_digest=report.digest,
                    base_revision=self.revisions[index],
                )
            )

    def age(self) -> None:
        for path in [*Path(self.store.root).rglob("*.json"), *self.settings.refs.rglob("*.json")]:
            os.utime(path, (OLD.timestamp(), OLD.timestamp()))

    def find(self, later: datetime.timedelta = datetime.timedelta(0), **options: Any) -> Any:
        now = datetime.datetime.now(datetime.UTC) + later
        spec = make_spec("home", migration={"retention": "30d"})
        revisions, aliases = options.pop("revisions", self.revisions), options.pop("aliases", ())
        return find_garbage(
            self.store, self.settings.refs, revisions, self.ledger, aliases, [spec], now, **options
        )


@pytest.fixture
def world(evergreen_home: Path):
    world = World(evergreen_home)
    yield world
    world.ledger.close()


def test_partitions_keep_what_was_made_for_them_until_they_are_deleted(world: World) -> None:
    world.serve(1)
    world.age()
    garbage = world.find()
    assert {one.ref for one in garbage.sweep.gone} == {world.stray}
    assert garbage.sweep.kept[world.made[0][1]] == f"newest of home/adapter, partition {world.revisions[0]}"
    gone = {one.ref for one in world.find(revisions=world.revisions[1:]).sweep.gone}
    assert gone == {world.stray, *world.made[0]}, "the dataset is named by the adapter that serves"


def test_an_old_revision_is_retired_when_nothing_can_be_served_from_it_again(world: World) -> None:
    world.serve(0)
    world.serve(1)
    world.age()
    assert world.find(retire=True).retired == (), "it can still be served again"
    garbage = world.find(later=31 * DAY, retire=True)
    assert garbage.retired == (world.revisions[0],)
    assert {one.ref for one in garbage.sweep.gone} == {world.stray, *world.made[0]}
    waits = Aliased("challenger", "home", world.made[0][1].digest, None, world.revisions[0])
    assert world.find(later=31 * DAY, retire=True, aliases=[waits]).retired == ()
    kept = world.find(later=31 * DAY, aliases=[waits], revisions=world.revisions[1:]).sweep.kept
    assert kept[world.made[0][1]] == "challenger of home"
    assert world.made[0][0] in kept, "its base stays with it"

    deleted: list[str] = []
    refused = collect(world.store, garbage, 30 * DAY, lambda: ["abc"], deleted.append)
    assert refused == "nothing is removed while runs are under way or have just ended: abc"
    assert deleted == [] and world.store.exists(world.stray)
    done = collect(world.store, garbage, 30 * DAY, list, deleted.append)
    assert done.startswith("removed 4 artifacts")
    assert deleted == [world.revisions[0]]
    world.store.open(world.made[1][1])
    world.store.open(world.dataset)
    with pytest.raises(FileNotFoundError):
        world.references.load(dg.AssetKey(["home", "adapter"]), world.revisions[0])


def test_what_the_source_holds_stays_though_a_newer_revision_is_known(world: World) -> None:
    world.age()
    assert world.find(retire=True).retired == (world.revisions[0],)
    book = DecisionBook(world.ledger)
    book.note("base:tiny", "current", {"revision": world.revisions[0]})  # the publisher went back
    assert world.find(retire=True).retired == (world.revisions[1],)
    book.note("base:tiny", "current", {"revision": "tiny@000000000009"})  # its partition was deleted
    assert world.find(retire=True).retired == (world.revisions[0],)


def collecting(world: World, instance: dg.DagsterInstance, meanwhile: Any = None, **config: Any) -> str:
    """What a collection says at its end; `meanwhile` happens while it searches. An alias points at a model
    that somebody else registered."""

    def aliased() -> list[tuple[str, VersionInfo]]:
        if meanwhile:
            meanwhile()
        return [("champion", VersionInfo("theirs", "1", "", {}))]

    tracking: Any = SimpleNamespace(aliased=aliased)
    options = GarbageConfig(**{"dry_run": False} | config)
    return collect_garbage(options, instance, world.store, world.ledger, tracking, [make_spec("home")])[-1]


def test_a_run_that_starts_while_garbage_is_removed_keeps_what_it_finds(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = world.store.publish("adapter", {"manifest.json": b'{"number": "second"}'})
    found = sorted([world.stray, second], key=lambda ref: ref.digest)
    world.age()
    delete = world.store.delete
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions("base_models", world.revisions)
        running: list[dg.DagsterRun] = []

        def deleting(ref: ArtifactRef) -> None:
            running.append(create_run_for_test(instance, status=dg.DagsterRunStatus.STARTED))
            delete(ref)

        monkeypatch.setattr(world.store, "delete", deleting)
        done = collecting(world, instance)
        run = running[0].run_id[:8]
        assert done.startswith("removed 1 artifacts") and done.endswith(
            f"the rest stays while runs are under way or have just ended: {run}"
        )
        assert [world.store.exists(ref) for ref in found] == [False, True]
        dry = collecting(world, instance, dry_run=True)
        assert dry.startswith("a dry run: nothing is removed") and run in dry
        instance.report_run_failed(running[0])
        assert collecting(world, instance).startswith("removed 1 artifacts")


def test_a_run_that_came_and_went_while_garbage_was_looked_for_keeps_it(world: World) -> None:
    world.age()
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions("base_models", world.revisions)

        def run() -> None:
            instance.report_run_failed(create_run_for_test(instance, status=dg.DagsterRunStatus.STARTED))

        assert collecting(world, instance, run).startswith("nothing is removed while runs are under way")
        assert world.store.exists(world.stray)
        assert collecting(world, instance).startswith("removed 1 artifacts")


def test_what_was_found_again_a_moment_ago_stays(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    second = world.store.publish("adapter", {"manifest.json": b'{"number": "second"}'})
    found = sorted([world.stray, second], key=lambda ref: ref.digest)
    for number, ref in enumerate(found):
        world.store.remember("adapter", digest(number), ref, {})
    world.age()
    delete = world.store.delete

    def deleting(ref: ArtifactRef) -> None:
        assert world.store.recall("adapter", digest(1)) is not None
        delete(ref)

    monkeypatch.setattr(world.store, "delete", deleting)
    removed, _ = remove(world.store, world.find().sweep, 30 * DAY, list)
    assert [one.ref for one in removed] == found[:1] and world.store.exists(found[1])


def test_a_damaged_artifact_stays_and_what_is_left_of_it_counts(world: World) -> None:
    named = world.store.publish("dataset", {"manifest.json": b'{"named": 1}'})
    files = {"a.json": b"{}", "b.json": canonical_json({"dataset": named.digest})}
    incomplete = world.store.publish("adapter", files)
    nameless = world.store.publish("base_model", {"manifest.json": b"[]"})
    unreadable = world.store.publish("base_model", {"manifest.json": b"{"})
    world.age()
    (Path(world.store.location(incomplete)) / "a.json").unlink()
    found = world.find().sweep
    assert {one.ref for one in found.gone} == {world.stray}
    assert {ref for ref, why in found.kept.items() if why == "it is damaged"} == {
        incomplete,
        nameless,
        unreadable,
    }
    assert found.kept[named] == f"named by {incomplete}"


def test_the_evidence_of_a_climb_stays_for_the_retention(world: World) -> None:
    world.serve(1)
    world.age()
    rung = RungResult("copy", "copy", "reject", "worse", adapter_digest=world.stray.digest)
    climb = Climb(digest(7), "home", world.revisions[1], "c" * 64, world.revisions[0], "d" * 64, (rung,))
    DecisionBook(world.ledger).record_climb(climb)
    assert world.find().sweep.gone == ()
    assert {one.ref for one in world.find(later=200 * DAY).sweep.gone} == {world.stray}


def test_a_note_that_can_not_be_read_stops_everything(world: World) -> None:
    next(world.settings.refs.rglob("*.json")).write_text("{")
    with pytest.raises(ValueError, match="expected a reference to an artifact"):
        world.find()


@pytest.mark.slow
def test_the_command(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.serve(1)
    world.age()
    assert main(["init"]) == 0
    with dg.DagsterInstance.from_config(str(world.settings.dagster_home)) as instance:
        instance.add_dynamic_partitions("base_models", world.revisions)
    assert main(["gc", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert f"adapter {world.stray.digest}" in told and "a dry run: nothing is removed" in told
    assert world.store.exists(world.stray)
    assert main(["gc"]) == 0
    assert "removed 1 artifacts" in capsys.readouterr().out
    assert not world.store.exists(world.stray) and world.store.exists(world.made[0][1])
