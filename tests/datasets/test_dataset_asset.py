import base64
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import dagster as dg
import pytest
from traffic_records import record

from ml_assets.artifacts import ArtifactStore
from ml_assets.datasets.asset import build_dataset_asset, build_source_asset
from ml_assets.datasets.pictures import count_words, length_histogram
from ml_assets.settings import Settings
from ml_assets.spec import CustomizationSpec
from ml_assets.traffic.store import TrafficLog
from resources.artifact_store import ArtifactRefIOManager, ArtifactStoreResource
from resources.ledger import LedgerResource
from resources.traffic_log import TrafficLogResource

SOURCE, DATASET = dg.AssetKey(["faq", "source"]), dg.AssetKey(["faq", "dataset"])


def spec(**changes) -> CustomizationSpec:
    return CustomizationSpec(
        **{
            "name": "faq",
            "description": "Answers questions.",
            "owners": ["team:shop"],
            "source": {"kind": "jsonl", "path": "faq.jsonl"},
            "prompt": {"user": "{q}", "target": "{a}"},
            "base_models": ["base"],
            "evaluation": {"task": "classification", "segments": ["lang"]},
            "freshness": {"dataset": "7d"},
            **changes,
        }
    )


def write(folder: Path, rows) -> None:
    (folder / "faq.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def faq(count: int) -> list[dict]:
    return [
        {"q": f"Where is item {n} of {n * 7919 % 997}?", "a": "left" if n % 3 else "right", "lang": "en"}
        for n in range(count)
    ]


@pytest.fixture
def instance():
    with dg.instance_for_test() as instance:
        yield instance


def resources() -> dict:
    return {
        "artifact_store": ArtifactStoreResource(),
        "io_manager": ArtifactRefIOManager(),
        "traffic_log": TrafficLogResource(),
        "ledger": LedgerResource(),
    }


def definitions(assets) -> dg.Definitions:
    return dg.Definitions(assets=assets, resources=resources())


def materialize(folder: Path, instance, selected=(DATASET,), **changes) -> dg.ExecuteInProcessResult:
    assets = [build_source_asset(spec(**changes), folder), build_dataset_asset(spec(**changes), folder)]
    if list(selected) == [SOURCE]:
        job = definitions(assets).resolve_implicit_global_asset_job_def()
        observe = job.get_subset(asset_selection={SOURCE})
        return observe.execute_in_process(instance=instance, raise_on_error=False)
    return dg.materialize(
        assets,
        selection=[assets[1]],
        instance=instance,
        raise_on_error=False,
        resources=resources(),
    )


def checks(result) -> dict[str, bool]:
    return {check.check_name: check.passed for check in result.get_asset_check_evaluations()}


def failure(result) -> str:
    (event,) = [event for event in result.all_events if event.is_step_failure]
    assert event.step_failure_data.user_failure_data is not None, event
    return event.step_failure_data.user_failure_data.description


def test_metadata_is_what_an_operator_needs(tmp_path, instance):
    write(tmp_path, [*faq(80), *faq(2), {"q": "mail a@b.com", "a": "left", "lang": "de"}])
    result = materialize(tmp_path, instance)
    assert result.success
    (event,) = result.asset_materializations_for_node("faq__dataset")
    metadata = event.metadata
    ref = ArtifactRefIOManager().load(DATASET)
    assert metadata["digest"].value == ref.digest == event.tags["dagster/data_version"]
    assert metadata["train_rows"].value + metadata["evaluation_rows"].value == 81
    assert metadata["dagster/row_count"].value == 81
    assert [record.data for record in metadata["removed"].records] == [
        {"reason": "exact_duplicate", "rows": 2, "what": "repeats another row"}
    ]
    assert len(metadata["removed_examples"].records) == 2
    assert [record.data for record in metadata["redacted_by_kind"].records] == [{"kind": "email", "found": 1}]
    assert {record.data["split"] for record in metadata["sample"].records} == {"train", "evaluation"}
    assert {record.data["value"] for record in metadata["segments"].records} == {"en", "de"}
    picture = metadata["lengths"].value
    assert picture.startswith("![lengths in words](data:image/png;base64,")
    assert len(picture) < 60_000
    assert checks(result) == {
        "no_leakage": True, "enough_rows": True, "both_splits": True, "class_balance": True, "bad_rows": True,
        "conflicting_labels": True, "feedback": True,
    }  # fmt: skip
    again = materialize(tmp_path, instance)
    assert again.asset_materializations_for_node("faq__dataset")[0].metadata["built_before"].value is True
    assert checks(again) == checks(result)


def test_the_ui_says_stale_when_the_source_changed_and_only_then(tmp_path, instance):
    def provenance(result) -> str:
        (event,) = result.asset_materializations_for_node("faq__dataset")
        return event.tags["dagster/input_data_version/faq/source"]

    def observed() -> str:
        record = instance.fetch_observations(SOURCE, limit=1).records[0]
        return record.event_log_entry.asset_observation.tags["dagster/data_version"]

    write(tmp_path, faq(80))
    assert materialize(tmp_path, instance, [SOURCE]).success
    first = observed()
    assert provenance(materialize(tmp_path, instance)) == first
    write(tmp_path, faq(90))
    # the dataset reads the source itself: what it read is what it is of
    assert provenance(materialize(tmp_path, instance)) == observed() != first
    assert materialize(tmp_path, instance, [SOURCE]).success
    assert observed() == provenance(materialize(tmp_path, instance))


@pytest.mark.parametrize(
    ("rows", "changes", "failed", "message"),
    [
        (faq(12), {}, "enough_rows", "enough_rows: .* train rows, 20 needed"),
        (faq(80), {"dataset": {"min_evaluation_rows": 500}}, "enough_rows", "evaluation rows, 500 needed"),
    ],
)
def test_what_would_be_dishonest_is_refused(tmp_path, instance, rows, changes, failed, message):
    write(tmp_path, faq(80))
    assert materialize(tmp_path, instance).success
    before = ArtifactRefIOManager().load(DATASET)
    write(tmp_path, rows)
    result = materialize(tmp_path, instance, **changes)
    assert not result.success
    assert checks(result)[failed] is False
    assert not result.asset_materializations_for_node("faq__dataset")

    assert re.search(message, failure(result))
    assert ArtifactRefIOManager().load(DATASET) == before, "the dataset before stays"


def test_an_empty_side_is_refused(tmp_path, instance):
    write(tmp_path, faq(80))
    result = materialize(tmp_path, instance, dataset={"evaluation_share": 1e-9})
    assert checks(result)["both_splits"] is False
    assert "both_splits: no evaluation rows" in failure(result)
    assert not (Path(ArtifactStoreResource().store().root) / "dataset").exists()


def test_leakage_refuses(tmp_path, instance, monkeypatch):
    """A remover that misses rows is caught by the measure."""
    remover = "ml_assets.datasets.snapshot._Builder.drop_leaks"
    monkeypatch.setattr(remover, lambda self, train, evaluation: train)
    text = "the committee met on monday to talk about the budget for the coming year and agreed on nothing"
    write(tmp_path, [*faq(80), *({"q": f"{text}{'.' * n}", "a": "left", "lang": "en"} for n in range(10))])
    result = materialize(tmp_path, instance)
    assert not result.success
    assert checks(result)["no_leakage"] is False
    assert "no_leakage: training rows that repeat evaluation rows: 0 exact" in failure(result)


def test_warnings_do_not_block(tmp_path, instance):
    rows = [{**row, "a": "left"} for row in faq(80)]
    rows += [
        {"q": "open?", "a": "left", "lang": "en"},
        {"q": "open?", "a": "right", "lang": "en"},
        {"q": "x"},
    ]
    write(tmp_path, rows)
    result = materialize(tmp_path, instance, dataset={"max_bad_share": 0.1})
    assert result.success
    failed = {name for name, passed in checks(result).items() if not passed}
    assert failed == {"class_balance", "bad_rows", "conflicting_labels"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"q": "a"}\n{"q": "b"\n', r"faq\.jsonl: no column 'a', 'lang'; the columns are: q"),
        ('{"q": "a", "a": "b", "lang": "c"}\n{"q"\n', r"1 of 2 rows .*\n  faq\.jsonl:2: not JSON \("),
        ("\n", r"faq\.jsonl: the source is empty, expected at least one row"),
    ],
)
def test_bad_input_is_one_clear_failure_without_retry(tmp_path, instance, content, message):

    (tmp_path / "faq.jsonl").write_text(content)
    result = materialize(tmp_path, instance)
    assert not result.success
    assert re.search(message, failure(result))


def test_feedback_is_shown_with_what_was_left_out(tmp_path, instance):
    log = TrafficLog(TrafficLogResource().url)
    texts = [f"{word} {word} my question about {word}" for word in ("zebras", "quinces", "violins", "yachts")]
    asked = [
        record("faq", asked=text, answer="left" if text == texts[0] else "?", metadata={"lang": "en"})
        for text in [*texts, faq(1)[0]["q"]]
    ]
    log.append(asked)
    for one in asked:  # the last one contradicts the source
        log.give_feedback(one.id, one.key_id, None, "left")
    write(tmp_path, faq(80))
    result = materialize(tmp_path, instance, feedback={"max_share_per_key": 1})
    (event,) = result.asset_materializations_for_node("faq__dataset")
    assert event.metadata["feedback_given"].value == 5
    assert event.metadata["feedback_rows"].value == 3
    removed = {r.data["reason"]: r.data["rows"] for r in event.metadata["removed"].records}
    assert removed["feedback_conflict"] == 1
    (check,) = [c for c in result.get_asset_check_evaluations() if c.check_name == "feedback"]
    assert not check.passed and check.severity == dg.AssetCheckSeverity.WARN
    assert "5 right answers from users" in check.description and "1 feedback_conflict" in check.description
    (row,) = [r.data for r in check.metadata["keys"].records]
    assert (row["key"], row["rows"], row["contradictions"], row["believed"]) == ("0000000a", 5, 1, True)
    nothing = materialize(tmp_path, instance, feedback={"use": "nothing"})
    (event,) = nothing.asset_materializations_for_node("faq__dataset")
    assert "feedback_given" not in event.metadata and checks(nothing)["feedback"]


def test_without_a_traffic_database_none_is_made(tmp_path, instance):
    write(tmp_path, faq(80))
    assert materialize(tmp_path, instance).success
    assert not (Settings.from_env().home / "traffic.db").exists()


def test_a_traffic_database_that_cannot_be_read_fails_and_takes_no_rows_away(tmp_path, instance):
    write(tmp_path, faq(80))
    Settings.from_env().home.joinpath("traffic.db").mkdir(parents=True)
    result = materialize(tmp_path, instance)
    assert not result.success and "the feedback can't be read" in failure(result)


def test_a_source_that_cannot_be_read_fails_its_observation(tmp_path, instance):
    result = materialize(tmp_path, instance, [SOURCE])
    assert "faq.jsonl: no such file" in failure(result)


def test_definitions_say_whose_it_is_and_how_fresh_it_should_be(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", dg.BetaWarning)
        source, dataset = build_source_asset(spec(), tmp_path), build_dataset_asset(spec(), tmp_path)
    dg.Definitions.validate_loadable(definitions([source, dataset]))
    for key, asset in ((SOURCE, source), (DATASET, dataset)):
        found = asset.specs_by_key[key]
        assert found.owners == ["team:shop"]
        assert found.group_name == "faq"
        assert found.tags["customization"] == "faq"
        assert "faq" in (found.description or "")
    assert source.is_observable
    assert source.specs_by_key[SOURCE].kinds == {"json"}
    policy = dataset.specs_by_key[DATASET].freshness_policy
    assert policy.fail_window.to_timedelta().days == 7
    blocking = {check.name for check in dataset.check_specs if check.blocking}
    assert blocking == {"no_leakage", "enough_rows", "both_splits"}


def test_loading_imports_nothing_heavy():
    code = (
        "import sys, ml_assets.datasets.asset;"
        "print([m for m in ('torch','transformers','datasets','mlflow','matplotlib','sklearn','datasketch')"
        " if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_histogram_is_a_small_picture():
    assert count_words("turn on, please: 21.5°") == 9
    markdown = length_histogram({"user": [1, 5, 9] * 500, "target": [10_000]})
    assert len(markdown) < 60_000
    data = base64.b64decode(markdown.removesuffix(")").partition("base64,")[2])
    assert data.startswith(b"\x89PNG")
    assert length_histogram({"user": [], "target": []})


def test_artifact_store_of_the_deployment_is_used(tmp_path, instance, evergreen_home):
    write(tmp_path, faq(80))
    assert materialize(tmp_path, instance).success
    ref = ArtifactRefIOManager().load(DATASET)
    assert ArtifactStore(str(evergreen_home / "artifacts")).exists(ref)
