"""An incremental update goes on from the champion: on new rows and a sample of the old, pinned and exact."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_training import small_base, small_dataset, small_spec

from ml_assets.adapters.incremental import NoUpdate, answer_kinds, plan_update, sample_old, update_recipe
from ml_assets.adapters.reproduce import compare, reproduce_inputs
from ml_assets.adapters.train import AdapterInputs, TrainedAdapter, open_inputs, train_adapter
from ml_assets.artifacts import ArtifactRef, ArtifactStore, read_json
from ml_assets.datasets.failures import DRILL
from ml_assets.datasets.snapshot import load_rows
from ml_assets.engine.lora import place
from ml_assets.spec import CustomizationSpec


@pytest.fixture
def store(evergreen_home: Path) -> ArtifactStore:
    return ArtifactStore(str(evergreen_home / "artifacts"))


@pytest.fixture
def base_model(store: ArtifactStore) -> ArtifactRef:
    return small_base(store)


@pytest.fixture
def champion(evergreen_home: Path, store: ArtifactStore, base_model: ArtifactRef) -> TrainedAdapter:
    return train_adapter(inputs_on(store, base_model, 40), store, evergreen_home)


def inputs_on(store: ArtifactStore, base_model: ArtifactRef, rows: int, **adapter: object) -> AdapterInputs:
    return open_inputs(small_spec(**adapter), store, base_model, small_dataset(store, rows))


def test_it_trains_on_new_rows_and_a_share_of_the_old(
    store: ArtifactStore, base_model: ArtifactRef, champion: TrainedAdapter
) -> None:
    grown = inputs_on(store, base_model, 60)
    planned = plan_update(grown, store, champion.ref, 0.25, 0.5)
    update = planned.update
    assert update is not None
    known = {row["_row"] for row in load_rows(store.open(small_dataset(store, 40)), "train")}
    assert {row["_row"] for row in update.new}.isdisjoint(known) and len(update.new) == 16
    assert {row["_row"] for row in update.replayed} <= known
    assert len(update.replayed) == round(0.25 * len(known))
    assert planned.key != grown.key
    assert planned.key != plan_update(grown, store, champion.ref, 0.0, 0.5).key
    assert planned.key != plan_update(grown, store, champion.ref, 0.25, 1.0).key
    assert planned.key != plan_update(grown, store, champion.ref, 0.25, 0.5, 0.9).key


def test_what_failed_in_production_is_seen_more_often_and_so_reproduced(
    evergreen_home: Path, store: ArtifactStore, base_model: ArtifactRef, champion: TrainedAdapter
) -> None:
    told = open_inputs(small_spec(), store, base_model, small_dataset(store, 60, told=6))
    fewer = replace(told, spec=spec_with(must_pass=2))
    update = plan_update(told, store, champion.ref, 0.0, 0.5).update
    assert update is not None
    seen = Counter(json.loads(row["meant"])["area"] + row["said"] for row in update.rows)
    failed = [row for row in update.new if row["_origin"] == "feedback"]
    assert 0 < len(failed) < len(update.new)
    for row in update.new:
        times = 1 + DRILL * (row in failed)
        assert seen[json.loads(row["meant"])["area"] + row["said"]] == times
    few = plan_update(fewer, store, champion.ref, 0.0, 0.5)
    assert few.update and len(few.update.drilled) == 2 * DRILL
    assert few.key != plan_update(told, store, champion.ref, 0.0, 0.5).key

    # a training from scratch as well; without feedback the number is no part of what it is
    plain = replace(inputs_on(store, base_model, 60), spec=spec_with(must_pass=2))
    assert plain.key == inputs_on(store, base_model, 60).key
    assert fewer.key != told.key
    as_often = train_adapter(replace(told, spec=spec_with(must_pass=0)), store, evergreen_home)
    for inputs in (few, fewer):
        trained = train_adapter(inputs, store, evergreen_home)
        assert not compare(store.open(trained.ref), store.open(as_often.ref))["adapter_model.safetensors"]
        # the YAML says something else by now
        again, manifest = reproduce_inputs(small_spec(), store, trained.ref, base_model)
        assert manifest["must_pass"] == 2 and again.key == inputs.key
        repeated = train_adapter(again, store, evergreen_home, reuse=False)
        assert all(compare(store.open(trained.ref), store.open(repeated.ref)).values())


def spec_with(**feedback: int) -> CustomizationSpec:
    return CustomizationSpec.model_validate(small_spec().model_dump() | {"feedback": feedback})


def test_it_starts_where_the_champion_is_and_can_be_reproduced(
    evergreen_home: Path, store: ArtifactStore, base_model: ArtifactRef, champion: TrainedAdapter
) -> None:
    grown = inputs_on(store, base_model, 60)
    planned = plan_update(grown, store, champion.ref, 0.25, 0.5, 0.9)
    updated = train_adapter(planned, store, evergreen_home)
    scratch = train_adapter(grown, store, evergreen_home)
    assert updated.record["losses"][0] < scratch.record["losses"][0] - 0.3

    manifest = read_json(store.open(updated.ref) / "manifest.json")
    assert manifest["parent"] == champion.ref.digest and manifest["rung"] == "incremental_update"
    assert manifest["update"] == {
        "generation": 1,
        "replay": 0.25,
        "layers": 0.5,
        "weight": 0.9,
        "new_rows": 16,
        "replayed_rows": 8,
    }
    before, after = (
        load_file(store.open(ref) / "adapter_model.safetensors") for ref in (champion.ref, updated.ref)
    )
    changed = {place(name)[1] for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {1}  # of two layers

    inputs, _ = reproduce_inputs(small_spec(), store, updated.ref, base_model)
    again = train_adapter(inputs, store, evergreen_home, reuse=False)
    assert all(compare(store.open(updated.ref), store.open(again.ref)).values())

    second = plan_update(inputs_on(store, base_model, 80), store, updated.ref, 0.1, 0.5)
    assert second.update is not None and second.update.generation == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"rank": 2}, "recipe differs in rank"), ({"targets": "attention"}, "recipe differs in targets")],
)
def test_another_shape_is_trained_from_scratch(
    store: ArtifactStore, base_model: ArtifactRef, champion: TrainedAdapter, change: dict, reason: str
) -> None:
    with pytest.raises(NoUpdate, match=reason):
        plan_update(inputs_on(store, base_model, 60, **change), store, champion.ref, 0.1, 0.5)


def test_another_base_or_nothing_new_is_refused(
    store: ArtifactStore, base_model: ArtifactRef, champion: TrainedAdapter
) -> None:
    other = small_base(store, seed=1)
    with pytest.raises(NoUpdate, match="it sits on base tiny@"):
        plan_update(inputs_on(store, other, 60), store, champion.ref, 0.1, 0.5)
    with pytest.raises(NoUpdate, match="no training row that adapter"):
        plan_update(inputs_on(store, base_model, 40), store, champion.ref, 0.1, 0.5)


def test_the_recipe_of_an_update_is_short_slow_and_warms_up() -> None:
    spec = small_spec(steps=12, learning_rate=0.02)
    recipe = update_recipe(spec).adapter
    assert (recipe.epochs, recipe.steps) == (spec.maintenance.update_epochs, None)
    assert recipe.learning_rate == 0.02 * spec.maintenance.update_rate and recipe.warmup == 0.3
    assert recipe.rank == spec.adapter.rank


ROWS = st.lists(st.tuples(st.sampled_from("aaaaaaab"), st.sampled_from("xy")), max_size=60)


@given(segments=ROWS, share=st.floats(0, 1), seed=st.text(max_size=4))
def test_old_rows_are_a_share_in_which_rare_kinds_count_for_more(
    segments: list[tuple[str, str]], share: float, seed: str
) -> None:
    rows = [{"_row": str(i), "intent": a, "language": b} for i, (a, b) in enumerate(segments)]
    chosen = sample_old(rows, ["language"], "{intent}", share, seed)
    assert abs(len(chosen) - share * len(rows)) <= 1
    assert chosen == sample_old(list(reversed(rows)), ["language"], "{intent}", share, seed)
    whole = Counter((row["intent"], row["language"]) for row in rows)
    part = Counter((row["intent"], row["language"]) for row in chosen)
    assert len({row["_row"] for row in chosen}) == len(chosen)
    for one, size in whole.items():
        for other, more in whole.items():
            if size < more:
                # the rarer kind gives fewer rows, but a larger share of its own; each is off by one at most
                assert part[one] <= part[other] + 2
                assert (part[one] + 1) / size >= (part[other] - 1) / more


def test_a_tenth_by_the_square_root_of_each_kind() -> None:
    sizes = {"a": 400, "b": 100, "c": 25, "d": 1}
    labels = [name for name, size in sizes.items() for _ in range(size)]
    rows = [{"_row": str(i), "label": label} for i, label in enumerate(labels)]
    found = Counter(row["label"] for row in sample_old(rows, [], "{label}", 0.1, "seed"))
    # 52.6 rows: 20 : 10 : 5 : 1 of them, but there is one d only
    assert found == {"a": 29, "b": 15, "c": 8, "d": 1}


def test_the_kind_of_an_answer_is_a_label_or_the_choices_of_its_json() -> None:
    assert answer_kinds(["yes", "no", "yes"]) == ["yes", "no", "yes"]
    assert set(answer_kinds([f"a story of {i} words" for i in range(40)])) == {""}
    calls = [json.dumps({"do": ["open", "close"][i % 2], "name": f"door {i}"}) for i in range(40)]
    kinds = answer_kinds([*calls, '{"do": "open", "area": "hall"}', "[1]", "no call"])
    assert len(set(kinds[:40])) == 2 and kinds[0] == kinds[2] != kinds[1]
    assert kinds[40] not in kinds[:40]  # other fields are another kind
    assert kinds[41:] == ["", ""]
