"""The migration benchmark: arithmetic on cells made by hand, its simulation, a real cell on tiny models."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from benchmarks import migration
from benchmarks.common import Options, Unavailable
from benchmarks.migration import (
    COPY,
    FULL,
    NONE,
    PORTED,
    Bench,
    Size,
    World,
    equality,
    figures,
    flips,
    full_cost,
    recovered,
    report,
    saved,
    spent,
)
from benchmarks.migration_tasks import migration_tasks
from ml_assets.adapters.rungs import Climb, RungResult
from ml_assets.artifacts import canonical_json, sha256_bytes
from ml_assets.settings import Settings
from tests.tiny_models import tiny_model

GATE = {"false_promotion": 0.02, "false_promotion_cells": 0.3, "worlds": []}


def cell(revision: str = "minor", means: Mapping[str, float] | None = None, full_ran: bool = False) -> dict:
    """Two hundred rows of which each variant has the first ones right: as many as its mean says."""
    rungs = [
        RungResult("bare", "zero_shot", "not shown", "", evaluation_seconds=3.0, screen_seconds=3.0),
        RungResult("copy", "copy", "reject", "", evaluation_seconds=42.0, screen_seconds=2.0, looks=3),
        RungResult(
            "tune", "copy", "promote", "", "a" * 64, training_seconds=10.0, evaluation_seconds=5.0, looks=3
        ),
    ]
    if full_ran:
        rungs[2] = dataclasses.replace(rungs[2], verdict="undecided")
        rungs.append(
            RungResult(
                "full", "scratch", "promote", "", training_seconds=100.0, evaluation_seconds=6.0, looks=3
            )
        )
    climb = Climb("c" * 64, "one", "before@0", "d" * 64, "before@1", "e" * 64, tuple(rungs), 100.0)
    values = {"champion": 0.9, PORTED: 0.88, NONE: 0.5, FULL: 0.9} | dict(means or {})
    right = {name: {f"{i:03}": i < round(200 * value) for i in range(200)} for name, value in values.items()}
    scores = {name: {row: float(ok) for row, ok in found.items()} for name, found in right.items()}
    return {
        "task": "one",
        "seed": 0,
        "revision": revision,
        "climb": dataclasses.asdict(climb),
        "seconds": {FULL: 80.0},
        "scores": scores,
        "right": right,
        "metric": "accuracy",
    }


def test_all_rungs_and_their_evaluations_are_paid_for():
    found = cell()
    assert spent(found) == 60.0
    # its training, and the first look without what only the ladder asks
    assert full_cost(found) == 80.0 + 40.0
    assert saved(found) == pytest.approx(0.5)


def test_a_climb_that_ends_in_a_full_training_saves_nothing():
    found = cell(full_ran=True)
    assert full_cost(found) == 100.0 + 40.0
    assert saved(found) == pytest.approx(1 - 166 / 140)


def test_the_gap_counts_only_where_the_full_retrain_gains():
    assert recovered(cell()) == pytest.approx((0.88 - 0.5) / (0.9 - 0.5))
    assert recovered(cell(means={FULL: 0.52})) is None
    assert recovered(cell(), COPY) is None


def test_flips_are_counted_against_the_champion():
    found = cell()
    assert flips(found, PORTED) == 4 and flips(found, FULL) == 0
    found["right"][FULL] = {row: not ok for row, ok in found["right"]["champion"].items()}
    assert flips(found, FULL) == 180


def test_figures_have_the_names_that_were_given_and_null_for_what_was_not_measured():
    naive = {FULL: 0.86}
    found = figures([cell(), cell("shapes", naive), cell("family", full_ran=True)], GATE)
    assert found == {
        "saved_minor": 0.5,
        "gap_recovered_minor": 0.95,
        "saved_shapes": 0.5,
        "gap_recovered_shapes": pytest.approx(0.38 / 0.36, abs=1e-3),
        "cost_ratio_cross_family": pytest.approx(166 / 140, abs=1e-3),
        "flips_vs_naive": 1 - 12 / 8,
        "false_promotion": 0.02,
        "false_promotion_cells": 0.3,
        "cells_accepted": 1.0,
    }
    alone = figures([cell()], GATE)
    assert alone["saved_shapes"] is None and alone["cost_ratio_cross_family"] is None
    assert list(json.loads(json.dumps(alone))) == list(found)


def test_equal_quality_needs_evidence():
    assert equality([cell(means={PORTED: 0.9})])["equal"]
    assert not equality([cell(means={PORTED: 0.86})])["equal"]
    few = cell(means={PORTED: 0.9})
    rows = list(few["scores"][FULL])[-20:]
    for name in (FULL, PORTED):
        few["scores"][name] = {row: few["scores"][name][row] for row in rows}
    assert not equality([few])["equal"], "twenty rows show nothing at two points"


def test_the_report_ends_with_the_line_of_figures(capsys):
    report([cell(), cell("family", full_ran=True)], GATE)
    lines = capsys.readouterr().out.strip().splitlines()
    assert json.loads(lines[-1])["saved_minor"] == 0.5
    assert any("one 0" in line and "tune" in line for line in lines)


def test_cells_whose_climb_accepted_nothing_are_counted():
    found = cell()
    for rung in found["climb"]["rungs"]:
        rung["verdict"] = "undecided"
    assert figures([found, cell()], GATE)["cells_accepted"] == 0.5


def test_cells_are_simulated_with_their_own_margin():
    margins = {
        task.spec(Path("x"), 0, 1500, 300).evaluation.gate.margin for task in migration_tasks().values()
    }
    assert margins == {world.margin for world in migration.CELL_WORLDS} == {migration.MARGIN}
    assert {world.rows for world in migration.CELL_WORLDS} == set(migration.CELL_ROWS)


def test_a_few_trials_give_shares_too():
    graded = next(world for world in migration.WORLDS if world.graded and world.looks == 1)
    found = migration.planted_regressions(2, [graded])
    assert 0 <= found["false_promotion"] <= 1
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("option", "reason"),
    [("--rows 40", "--rows 40 give 13 evaluation rows: .*expected max_rows"), ("--trials -1", "--trials -1")],
)
def test_too_little_of_it_is_told(option, reason, monkeypatch, tmp_path):
    command = ["migration", "--quick", "--cache", str(tmp_path), *option.split()]
    monkeypatch.setattr(migration, "planted_regressions", lambda *_: pytest.fail("simulated"))
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(Unavailable, match=reason):
        migration.main()


def test_what_is_remembered_is_of_the_code_beneath_as_well(monkeypatch, tmp_path):
    bench = Bench(Options(True, tmp_path, tmp_path, 1), Size(160, 56), lambda _: tmp_path)
    assert bench.remembered("x", {}, lambda: {"n": 1}) == {"n": 1}
    (file,) = (tmp_path / "migration" / "cells").iterdir()
    # the name that it had before these versions were looked at
    code = [migration.CELL_VERSION, migration.LADDER_VERSION, migration.REPORT_VERSION]
    assert file.stem == f"x-{sha256_bytes(canonical_json({'kind': 'x', 'code': code}))[:16]}"
    assert bench.remembered("x", {}, lambda: {"n": 2}) == {"n": 1}
    monkeypatch.setattr(migration, "PORT_VERSION", "other")
    assert bench.remembered("x", {}, lambda: {"n": 2}) == {"n": 2}


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("difference", [0.0, -0.03])
def test_planted_candidates_differ_by_as_much_as_is_planted(graded, difference):
    world = World(200_000, 0.8, 0.08, 1, 0.03, graded)
    generator = np.random.default_rng(0)
    champion = generator.random(world.rows) < world.level
    candidate = migration._candidate(champion, world, difference, generator)
    worth = (migration.RIGHT - migration.WRONG) if graded else 1.0
    assert (candidate.mean() - champion.mean()) * worth == pytest.approx(difference, abs=2e-3)
    assert (candidate != champion).mean() == pytest.approx(0.08 - difference / worth, abs=3e-3)


def test_the_simulation_tells_a_gate_that_lets_regressions_pass():
    def promoted(margin: float, looks: int) -> float:
        generator = np.random.default_rng(1)
        world = World(100, 0.9, 0.04, looks, margin, graded=False)
        trials = [migration._ladder(world, -migration.PLANTED, generator) for _ in range(30)]
        assert all(len(trial) <= looks for trial in trials)
        return migration._promoted(trials)

    assert promoted(0.02, 1) <= 0.1
    assert promoted(0.2, 1) > 0.5
    assert promoted(0.02, 4) <= 0.1, "four looks have no more than one"


def test_tasks_are_enough_and_valid(home_with_packages, monkeypatch, tmp_path):
    monkeypatch.setenv("EVERGREEN_HOME", str(home_with_packages))
    tasks = migration_tasks()
    assert len(tasks) >= 5 and sum(task.generative for task in tasks.values()) >= 2
    for name, task in tasks.items():
        rows = task.rows(60, 0)
        assert rows == task.rows(60, 0) and rows != task.rows(60, 1)
        spec = task.spec(tmp_path / "rows.jsonl", 2, 1200, 400)
        assert spec.name == f"{name}_2" and spec.adapter.seed == 2
        assert set(spec.columns()) <= set(rows[0])
        assert len({spec.prompt.user.format_map(row) for row in rows}) == 60


@pytest.mark.slow
def test_a_cell_is_measured_once(home_with_packages, monkeypatch, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "downloads").symlink_to(home_with_packages / "downloads")
    monkeypatch.setenv("EVERGREEN_HOME", str(tmp_path / "home"))
    kinds = {"original": ("llama", 0), "minor": ("llama", 1)}

    def made(revision):
        architecture, seed = kinds[revision]
        folder = tmp_path / revision
        return folder if folder.exists() else tiny_model(architecture, folder, seed=seed)

    options = Options(True, tmp_path / "cache", tmp_path / "peers", 1)
    bench = Bench(options, Size(160, 56), made)
    found = bench.cell(migration_tasks()["devices_en"], 0, "minor")
    # a fresh adapter that a few steps make no better is none: it is left out
    assert {PORTED, NONE, FULL, migration.HALF, "champion"} <= set(found["scores"])
    rows = {name: set(scores) for name, scores in found["scores"].items()}
    assert len(set(map(frozenset, rows.values()))) == 1
    assert spent(found) > 0 and full_cost(found) > 0
    Climb.from_json(found["climb"])

    again = Bench(options, Size(160, 56), made)
    monkeypatch.setattr(migration.Cell, "measure", lambda self: pytest.fail("measured again"))
    assert again.cell(migration_tasks()["devices_en"], 0, "minor") == found
    assert Settings.from_env().home == tmp_path / "home"
