"""The port ladder on tiny bases: every rung has its reason, nothing is done twice, a kill costs nothing."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ladder_world import World, specification

from ml_assets.adapters import ladder as ladder_module
from ml_assets.adapters.ladder import Climbed, NotCarried, known_climb, trained_before
from ml_assets.adapters.port import Port, same_tokenizer
from ml_assets.adapters.reproduce import compare, reproduce_inputs
from ml_assets.adapters.rungs import Climb, RungResult
from ml_assets.adapters.train import open_inputs, train_adapter
from ml_assets.artifacts import ArtifactRef, read_json
from ml_assets.eval_reports import build, runner
from ml_assets.eval_reports.build import Champion, build_report, with_climb
from ml_assets.spec import CustomizationSpec


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("ladder"))


def rung(climbed: Climbed, name: str) -> RungResult:
    return next(result for result in climbed.climb.rungs if result.rung == name)


def manifest_of(world: World, digest: str | None) -> dict[str, Any]:
    assert digest is not None
    return read_json(world.store.open(ArtifactRef("adapter", digest)) / "manifest.json")


def test_a_minor_revision_takes_a_copy(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    climbed = world.climb("minor")
    bare, copied = climbed.climb.rungs
    assert (bare.verdict, bare.looks, bare.candidate) == ("not shown", 0, None)
    assert "validation rows" in bare.reason
    assert (copied.verdict, copied.looks) == ("promote", 4), "copy, tune, distil and full may look"
    assert copied.start in ("copy", "rescaled copy") and copied.steps == 0
    manifest = manifest_of(world, climbed.adapter.ref.digest)
    assert (manifest["rung"], manifest["parent"]) == ("copy", climbed.climb.champion_digest)
    assert climbed.climb.full_seconds and climbed.climb.saved is not None
    assert climbed.climb.seconds == pytest.approx(climbed.seconds, abs=0.5), "what was spent is in the rungs"

    for name in ("train_adapter", "build_report", "publish_prompted", "find_starts"):
        monkeypatch.setattr(ladder_module, name, lambda *_, **__: pytest.fail("climbed again"))
    again = world.climb("minor")
    assert again.climb == climbed.climb and again.seconds == 0.0
    assert again.adapter.ref == climbed.adapter.ref and again.adapter.reused


def test_starts_are_compared_on_a_few_rows_the_same_for_all(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[tuple[int, ...]]] = []
    real = ladder_module.losses_of

    def count(base: Any, folder: Any, examples: Any) -> list[float]:
        asked.append([tuple(example.target) for example in examples])
        return real(base, folder, examples)

    monkeypatch.setattr(ladder_module, "losses_of", count)
    monkeypatch.setattr(ladder_module, "START_ROWS", 5)
    climbed = world.climb("minor", specification(["copy", "distil"]))
    assert rung(climbed, "copy").start in ("copy", "rescaled copy")
    assert len(asked) == 3, "no adapter, the copy, the rescaled copy"
    assert all(len(rows) == 5 and rows == asked[0] for rows in asked)


@pytest.mark.parametrize(("champion", "shots", "shown"), [(0.226, 1, True), (0.224, 3, False)])
def test_a_copy_is_tuned_first_when_it_lost_more_than_half_of_the_margin(
    world: World, monkeypatch: pytest.MonkeyPatch, champion: float, shots: int, shown: bool
) -> None:
    """The margin is 0.15. The copy's loss is 0.3 nats per answer; the champion's is less by that or more."""

    def losses(_base: Any, folder: Any, _examples: Any) -> list[float]:
        return [5.0 if folder is None else 0.3]

    monkeypatch.setattr(ladder_module, "losses_of", losses)
    monkeypatch.setattr(ladder_module._Climber, "_champion_loss", lambda _: champion)
    climbed = world.climb("minor", specification(["copy", "tune"], few_shot=shots))
    copied = rung(climbed, "copy")
    assert (copied.looks > 0) == shown
    assert ("it is tuned first" in copied.reason) != shown


def test_the_report_is_that_of_the_look(world: World) -> None:
    spec = specification()
    climbed = world.climb("minor", spec)
    champion = Champion(world.champion(spec).ref, world.base("old"))
    place: dict[str, Any] = {"base_model": world.base("minor"), "dataset": world.dataset}
    found = known_climb(spec, world.home, world.store, world.home, champion=champion, **place)
    assert found is not None and found == climbed.climb
    look = found.of(climbed.adapter.ref.digest)
    assert look is not None

    def report(champion: Champion, looks: int) -> Any:
        return build_report(
            spec,
            world.home,
            world.store,
            world.home,
            adapter=climbed.adapter.ref,
            champion=champion,
            looks=looks,
            **place,
        )

    built = report(champion, look.looks)
    assert built.reused and built.ref.digest == look.report_digest
    shown = with_climb(built, found, spec, world.home, world.store, world.home)
    assert shown.decision == built.decision
    assert shown.decision["alpha"] == pytest.approx(0.05 / 2), "the first look has half of it"
    assert "look 1 of 4 at" in " ".join(shown.decision["notes"])
    page = (shown.directory / "report.html").read_text()
    assert "How was it carried over" in page and "not shown" in page and "not shown" in shown.markdown
    serving = report(Champion(climbed.adapter.ref, None), 1)
    assert serving.ref == shown.ref, "once it serves, it keeps the report that made it so"


def test_a_removed_layer_is_matched_by_weights(world: World) -> None:
    climbed = world.climb("shallow", specification(["copy", "full"]))
    copied = rung(climbed, "copy")
    assert copied.start in ("layer copy", "rescaled layer copy")
    assert copied.adapter_digest is not None, "good enough by its loss to be made"


def test_a_copy_worse_than_none_is_not_shown(world: World) -> None:
    climbed = world.climb("unlike", specification(["copy", "full"]))
    copied, full = climbed.climb.rungs
    assert copied.verdict == "not shown" and copied.adapter_digest is None
    assert "worse than no adapter" in copied.reason or "% of what the champion gains" in copied.reason
    assert full.looks == 1, "what is settled before the first look takes no share of alpha"
    assert climbed.climb.full_from == "measured" and climbed.adapter.ref.digest == full.adapter_digest
    spent, full_cost = climbed.climb.seconds, climbed.climb.full_seconds
    assert full_cost is not None and climbed.climb.saved == pytest.approx(1 - spent / full_cost)
    assert (climbed.climb.saved or 0) < 0, "a climb that ends in a full training costs more than one"


def test_other_sizes_start_from_a_mapped_adapter_or_none(world: World) -> None:
    climbed = world.climb("wide", specification(["copy", "tune"]))
    copied, tuned = climbed.climb.rungs
    assert copied.start == "mapped" and copied.verdict in ("not shown", "reject", "undecided", "promote")
    assert tuned.start in ("mapped", "scratch")
    port = manifest_of(world, tuned.adapter_digest)["port"]
    assert port["start"] == tuned.start and port["parent_base"] == world.base("old").digest
    assert 0 < tuned.steps <= 0.2 * 60


def test_another_tokenizer_goes_to_the_full_training(world: World) -> None:
    climbed = world.climb("foreign")
    assert [result.rung for result in climbed.climb.rungs] == ["bare", "copy", "tune", "distil", "full"]
    for name in ("copy", "tune", "distil"):
        assert rung(climbed, name).verdict == "skipped" and "another tokenizer" in rung(climbed, name).reason
        assert rung(climbed, name).adapter_digest is None
    assert rung(climbed, "full").looks == 1
    assert climbed.adapter.ref.digest == rung(climbed, "full").adapter_digest, "the best there is"


def test_a_climb_ends_where_more_rungs_could_show_no_more(world: World) -> None:
    """So few rows for so narrow a margin that an adapter with the champion's own answers is undecided."""
    narrow = {"margin": 0.001, "max_forgetting": 50, "max_negative_flips": 0.3}
    climbed = world.climb("minor", specification(["copy", "tune", "full"], gate=narrow, max_rows=None))
    [copied] = climbed.climb.rungs
    assert (copied.verdict, copied.look, copied.looks) == ("undecided", 1, 3)
    assert copied.rows_missing > copied.rows > 0
    assert f"no higher rung is tried: {copied.rows_missing} rows are needed" in copied.reason
    assert climbed.adapter.ref.digest == copied.adapter_digest
    assert Climb.from_json(json.loads(json.dumps(dataclasses.asdict(climbed.climb)))) == climbed.climb


def test_tune_and_distil_reproduce(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a gate that nothing passes, and no end to the climb for want of rows, every rung is tried; each
    gives the same bytes again."""
    monkeypatch.setattr(ladder_module, "EVEN", 0.0)
    strict = {"margin": 0.001, "max_forgetting": 1e-9}
    spec = specification(["tune", "distil"], gate=strict, max_rows=None)
    climbed = world.climb("minor", spec)
    tuned, distilled = climbed.climb.rungs
    assert tuned.verdict != "promote" and distilled.verdict != "promote"
    assert distilled.start == "tune"
    assert manifest_of(world, distilled.adapter_digest)["port"]["warm"] == tuned.adapter_digest
    best = max((tuned, distilled), key=lambda result: result.candidate or 0.0)
    assert climbed.adapter.ref.digest == best.adapter_digest
    for result in (tuned, distilled):
        assert result.adapter_digest is not None
        ref = ArtifactRef("adapter", result.adapter_digest)
        inputs, _ = reproduce_inputs(spec, world.store, ref, world.base("minor"))
        again = train_adapter(inputs, world.store, world.home, reuse=False)
        assert all(compare(world.store.open(ref), world.store.open(again.ref)).values())
        assert again.ref == ref, "the manifest as well"


def test_a_tokenizer_that_pads_in_another_way_is_no_other_one(world: World) -> None:
    climbed = world.climb("padded", specification(["copy"]))
    [copied] = climbed.climb.rungs
    assert copied.verdict == "promote" and copied.start in ("copy", "rescaled copy")
    folders = {name: world.store.open(world.base(name)) for name in ("old", "padded", "foreign")}
    assert same_tokenizer(folders["padded"], folders["old"])
    assert not same_tokenizer(folders["padded"], folders["foreign"]), "other tokens"


def test_a_teacher_with_other_tokens_teaches_by_its_answers(world: World) -> None:
    spec = specification()
    inputs = open_inputs(spec, world.store, world.base("foreign"), world.dataset)
    port = Port("distil", "scratch", world.champion(spec).ref, world.base("old"), 0.2, 0.1)
    trained = train_adapter(dataclasses.replace(inputs, port=port), world.store, world.home)
    manifest = manifest_of(world, trained.ref.digest)
    assert manifest["rung"] == "distil" and manifest["port"]["rows"] > 0


def test_without_any_adapter_it_says_why(world: World) -> None:
    with pytest.raises(NotCarried, match=r"copy: another tokenizer"):
        world.climb("foreign", specification(["copy"]))


def test_what_was_worth_no_look_is_shown_when_nothing_else_is_there(world: World) -> None:
    climbed = world.climb("unlike", specification(["bare"]))
    (bare,) = climbed.climb.rungs
    assert bare.looks == 1 and bare.verdict in ("reject", "undecided")
    assert climbed.adapter.ref.digest == bare.adapter_digest


def test_a_full_training_of_before_is_known(world: World) -> None:
    spec = specification()
    inputs = open_inputs(spec, world.store, world.base("other"), world.dataset)
    assert trained_before(inputs, world.store, "lora") is None
    trained = train_adapter(inputs, world.store, world.home)
    found = trained_before(inputs, world.store, "lora")
    assert found is not None and found.ref == trained.ref


@pytest.mark.parametrize(
    "change",
    [
        {"rungs": ["copy"]},
        {"recipe": {"learning_rate": 0.02}},
        {"few_shot": 1},
    ],
)
def test_other_inputs_climb_again(world: World, change: dict[str, Any]) -> None:
    champion = Champion(ArtifactRef("adapter", "a" * 64), ArtifactRef("base_model", "b" * 64))

    def key(spec: CustomizationSpec) -> str:
        arguments = (world.home, world.home, ArtifactRef("base_model", "c" * 64), world.dataset, champion)
        return ladder_module.climb_key(spec, *arguments)

    assert key(specification()) == key(specification())
    assert key(specification()) != key(specification(**change))


def test_a_climb_survives_its_journey_through_json() -> None:
    result = RungResult("tune", "copy", "undecided", "needs rows", "a" * 64, looks=3, training_seconds=1.5)
    climb = Climb("k" * 64, "c", "r", "d", "e", "f", (result,), full_seconds=6.0)
    assert Climb.from_json(json.loads(json.dumps(dataclasses.asdict(climb)))) == climb
    assert climb.saved == 0.75 and "run_id" not in climb.table()


# -- what was lost -------------------------------------------------------------------------------------


def damage(world: World, kind: str, digest: str | None) -> None:
    assert digest is not None
    folder = world.store.open(ArtifactRef(kind, digest))
    next(path for path in sorted(folder.iterdir()) if path.suffix == ".json").write_text("{}")


def test_damaged_adapters_and_reports_of_a_climb_are_made_again(world: World) -> None:
    spec = specification(["bare", "copy"])
    climbed = world.climb("minor", spec)
    bare, copied = climbed.climb.rungs
    assert bare.verdict == "not shown" and copied.verdict == "promote"
    damage(world, "adapter", bare.adapter_digest)
    damage(world, "adapter", copied.adapter_digest)
    damage(world, "eval_report", copied.report_digest)
    again = world.climb("minor", spec)
    assert again.climb == climbed.climb, "with the costs of the first time"
    assert again.adapter.ref == climbed.adapter.ref
    for result in (bare, copied):
        assert manifest_of(world, result.adapter_digest)
    assert copied.report_digest and world.store.open(ArtifactRef("eval_report", copied.report_digest))


def test_a_deleted_adapter_that_was_shown_at_last_is_made_again(world: World) -> None:
    spec = specification(["bare"])
    climbed = world.climb("unlike", spec)
    world.store.delete(climbed.adapter.ref)
    again = world.climb("unlike", spec)
    assert again.climb == climbed.climb and again.adapter.ref == climbed.adapter.ref


# -- kills ---------------------------------------------------------------------------------------------

PROGRAM = Path(__file__).with_name("ladder_world.py")


def run_until(home: Path, base: str, stop: str | None) -> tuple[list[str], dict[str, Any] | None]:
    """The program's lines; killed at the first that begins with `stop`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "EVERGREEN_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), str(home), base],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line.strip())
            if stop and line.startswith(stop):
                process.send_signal(signal.SIGKILL)
                break
        process.wait(timeout=300)
    finally:
        process.kill()
    return lines, json.loads(lines[-1]) if stop is None else None


class Killed(Exception):
    pass


def killed(*_: Any, **__: Any) -> None:
    raise Killed


PAUSE = 0.3


def climb_until_killed(world: World, base: str, spec: CustomizationSpec) -> None:
    """A climb that is killed in its training, after a step that took PAUSE seconds."""

    def slow_then_killed(progress: Any) -> None:
        if progress.step == 1:
            time.sleep(PAUSE)
        if progress.step == 4:
            raise Killed

    with pytest.raises(Killed):
        world.climb(base, spec, on_progress=slow_then_killed, checkpoint_seconds=0.0)


def test_what_a_killed_climb_had_spent_on_a_training_counts(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed within the full training, and again in the evaluation after it."""
    spec = specification(["full"], {"steps": 6})
    world.champion(spec)
    climb_until_killed(world, "unlike", spec)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ladder_module, "build_report", killed)
        world.climb("unlike", spec, checkpoint_seconds=0.0)
    climbed = world.climb("unlike", spec)
    [full] = climbed.climb.rungs
    record = climbed.adapter.record
    assert record["resumed_from"] == 3 and record["earlier_seconds"] > PAUSE
    assert full.training_seconds == pytest.approx(record["seconds"] + record["earlier_seconds"])
    assert climbed.climb.full_from == "measured" and climbed.climb.saved == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("where", "slow_arm"),
    [("_measure_starts", "champion"), ("summarize", "few_shot"), ("_shown", "few_shot")],
)
def test_what_a_killed_climb_had_spent_on_evaluations_counts(
    where: str, slow_arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed once the champion has answered, once the arms of a report have, and once it is published."""
    world, spec = World(tmp_path), specification(["copy"])
    world.champion(spec)
    compute, pause = runner._compute, 10 * PAUSE

    def slow(*args: Any, **kwargs: Any) -> Any:
        if args[4].name == slow_arm:
            time.sleep(pause)
        return compute(*args, **kwargs)

    def then_killed(*args: Any, **kwargs: Any) -> None:
        build.build_report(*args, **kwargs)
        raise Killed

    monkeypatch.setattr(runner, "_compute", slow)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if where == "_shown":
            patch.setattr(ladder_module, "build_report", then_killed)
        else:
            patch.setattr(build if where == "summarize" else ladder_module._Climber, where, killed)
        world.climb("minor", spec)
    [copied] = world.climb("minor", spec).climb.rungs
    assert copied.looks and pause <= copied.evaluation_seconds - copied.screen_seconds < 2 * pause


def test_the_champions_answers_cost_every_climb_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, spec = World(tmp_path), specification(["full"], {"steps": 6})
    world.champion(spec)
    ask = build._Questions.ask_champion

    def slow(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(runner, "_compute", slower)
        try:
            return ask(*args, **kwargs)
        finally:
            monkeypatch.setattr(runner, "_compute", compute)

    def slower(*args: Any, **kwargs: Any) -> Any:
        time.sleep(10 * PAUSE)
        return compute(*args, **kwargs)

    compute = runner._compute
    monkeypatch.setattr(build._Questions, "ask_champion", slow)
    for base in ("minor", "unlike"):
        [full] = world.climb(base, spec).climb.rungs
        assert full.evaluation_seconds > 10 * PAUSE


def test_a_resumed_training_counts_what_came_before(world: World) -> None:
    spec = specification(["full"], {"steps": 6})
    world.champion(spec)
    climb_until_killed(world, "wide", spec)
    climbed = world.climb("wide", spec)
    [full] = climbed.climb.rungs
    assert full.training_seconds > climbed.adapter.record["seconds"] + PAUSE
    assert climbed.climb.seconds > climbed.seconds, "the budget has what this process took"


def test_a_training_from_before_the_climb_costs_nothing(world: World) -> None:
    spec = specification(["full"], {"steps": 6})
    inputs = open_inputs(spec, world.store, world.base("shallow"), world.dataset)
    before = train_adapter(inputs, world.store, world.home)
    world.store.remember("adapter", inputs.key, before.ref, before.record | {"trained_at": "2020-01-01T00"})
    [full] = world.climb("shallow", spec).climb.rungs
    assert full.adapter_digest == before.ref.digest and full.training_seconds == 0.0


def test_measuring_is_paid_for_by_a_rung_where_a_copy_is_impossible(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder_module, "OVERHEAD", 1e6)
    climbed = world.climb("foreign", specification(["bare", "copy", "tune"]))
    assert rung(climbed, "tune").verdict != "skipped", "for which the start was measured"
    copied = rung(climbed, "copy")
    assert copied.verdict == "skipped" and copied.training_seconds > 0


@pytest.mark.slow
def test_a_killed_climb_goes_on_and_repeats_no_training(tmp_path: Path) -> None:
    whole, expected = run_until(tmp_path / "whole", "unlike", None)
    steps = [line for line in whole if line.startswith("step")]
    home = tmp_path / "killed"
    seen: list[str] = []
    # in the champion's rungs: after the first decision, in the tune, after it, and in the full training
    for stop in ("rung switches, bare", "step 3", "rung switches, tune", "step 25"):
        lines, _ = run_until(home, "unlike", stop)
        seen += lines
    lines, found = run_until(home, "unlike", None)
    seen += lines
    assert found is not None and expected is not None

    def what(climb: dict[str, Any]) -> list[Any]:
        return [
            (r["rung"], r["start"], r["verdict"], r["adapter_digest"], r["looks"]) for r in climb["rungs"]
        ]

    assert what(found) == what(expected), "the same bytes, the same verdicts"
    repeated = len([line for line in seen if line.startswith("step")]) - len(steps)
    assert repeated <= 4, "a kill costs the step under way"
