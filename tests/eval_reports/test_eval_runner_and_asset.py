"""The whole way on a tiny base: train, evaluate, decide, report, record in MLflow, and not again."""

import json
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import torch
from tiny_models import tiny_model

from ml_assets.adapters.recipe import MAX_LABELS, answer_labels
from ml_assets.adapters.train import open_inputs, train_adapter
from ml_assets.artifacts import ArtifactRef, ArtifactStore, sha256_bytes
from ml_assets.base_models.partitions import BASE_MODELS
from ml_assets.datasets.snapshot import Snapshot, load_rows, write_snapshot
from ml_assets.engine.loading import load_base
from ml_assets.eval_reports import build as build_module
from ml_assets.eval_reports.asset import build_eval_report_asset
from ml_assets.eval_reports.build import Champion, build_report
from ml_assets.eval_reports.metrics import MetricError
from ml_assets.eval_reports.report import segments_plot
from ml_assets.eval_reports.runner import (
    Answer,
    Arm,
    EvaluationError,
    _holds,
    answer,
    build_messages,
    choose_examples,
    evaluate,
    fitting_examples,
    load_must_pass,
    neutral_texts,
    select_rows,
)
from ml_assets.spec import CustomizationSpec
from resources.artifact_store import ArtifactRefIOManager, ArtifactStoreResource
from resources.ledger import LedgerResource
from resources.mlflow_tracking import MlflowTracking

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DEVICES = ["light", "lamp", "window", "door", "radio", "oven"]
ROOMS = ["kitchen", "bedroom", "living room", "hall", "office", "attic", "cellar", "garden"]


def specification(**evaluation: Any) -> CustomizationSpec:
    return CustomizationSpec.model_validate(
        {
            "name": "switches",
            "owners": ["team:home"],
            "source": {"kind": "jsonl", "path": "rows.jsonl"},
            "prompt": {"user": "{text}", "target": "{label}"},
            "base_models": ["tiny"],
            "adapter": {"rank": 16, "steps": 80, "batch_tokens": 512, "learning_rate": 0.01},
            "evaluation": {"task": "classification", "segments": ["label"], "few_shot": 2, **evaluation},
        }
    )


def rows(flipped: bool = False) -> list[dict[str, str]]:
    found = []
    for device in DEVICES:
        for room in ROOMS:
            for verb in ("on", "off"):
                text = f"turn {verb} the {device} in the {room}"
                wrong = "off" if verb == "on" else "on"
                label = wrong if flipped else verb
                found.append({"text": text, "label": label, "_row": sha256_bytes(text.encode())})
    return sorted(found, key=lambda row: row["_row"])


class Inputs:
    """Two tiny bases, datasets right and wrong, and adapters trained on them, in a store."""

    def __init__(self, home: Path):
        self.home = home
        self.store = ArtifactStore(str(home / "artifacts"))
        self.spec = specification()
        self.bases = [self._base(seed) for seed in (0, 1)]
        self.dataset = self._dataset(flipped=False)
        self.flipped = self._dataset(flipped=True)

    def _base(self, seed: int) -> ArtifactRef:
        with self.store.staging("base_model") as directory:
            tiny_model("llama", directory, seed=seed)
            manifest = {
                "family": "tiny",
                "revision": self.revision(seed),
                "identity": sha256_bytes(f"tiny{seed}".encode()),
                "tokenizer_sha256": "t",
                "chat_template_sha256": "c",
                "chat_template": "model",
                "weights_sha256": f"w{seed}",
                "architecture": "LlamaForCausalLM",
                "context_length": 512,
                "eos_token_ids": [],
                "lora_targets": {"all-linear": TARGETS},
            }
            (directory / "manifest.json").write_text(json.dumps(manifest))
            return self.store.publish_directory("base_model", directory)

    def revision(self, seed: int) -> str:
        return f"tiny@{seed:012d}"

    def _dataset(self, flipped: bool) -> ArtifactRef:
        right = rows()
        train = [row | {"_split": "train"} for row in rows(flipped)[::2]]
        evaluation = [row | {"_split": "evaluation"} for row in right[1::2]]
        manifest = {"source_version": "v1", "rows": {"train": len(train), "evaluation": len(evaluation)}}
        with self.store.staging("dataset") as directory:
            write_snapshot(Snapshot(train, evaluation, ["text", "label"], {}, {}), directory, manifest)
            return self.store.publish_directory("dataset", directory)

    def adapter(self, base: int = 0, flipped: bool = False, **recipe: Any) -> ArtifactRef:
        spec = self.spec.model_copy(update={"adapter": self.spec.adapter.model_copy(update=recipe)})
        data = self.flipped if flipped else self.dataset
        return train_adapter(open_inputs(spec, self.store, self.bases[base], data), self.store, self.home).ref


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    torch.manual_seed(0)
    return Inputs(tmp_path_factory.mktemp("eval-home"))


def report(inputs: Inputs, adapter: ArtifactRef, champion: Champion | None = None, **evaluation: Any):
    return build_report(
        specification(**evaluation),
        inputs.home,
        inputs.store,
        inputs.home,
        adapter=adapter,
        dataset=inputs.dataset,
        base_model=inputs.bases[0],
        champion=champion,
    )


def count_prompts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each generation from now on is given, as they come."""
    from ml_assets.engine import generation

    asked: list[int] = []
    real = generation.generate

    def count(base: Any, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(len(prompts))
        return real(base, prompts, *args, **kwargs)

    monkeypatch.setattr(generation, "generate", count)
    return asked


def test_first_adapter_is_promoted_against_the_base(inputs: Inputs) -> None:
    built = report(inputs, inputs.adapter())
    decision = built.decision
    assert (decision["verdict"], decision["against"], decision["claim"]) == ("promote", "base", "better")
    assert decision["reference"] in ("few_shot", "zero_shot")
    assert decision["forgetting"] is not None
    lines = [json.loads(line) for line in (built.directory / "rows.jsonl").read_text().splitlines()]
    assert {line["arm"] for line in lines} == {"zero_shot", "few_shot", "adapter"}
    assert len(lines) == 3 * built.summary["rows"] == 3 * 48
    for arm, entry in built.summary["arms"].items():  # every mean follows from the lines
        scores = [line["scores"]["accuracy"] for line in lines if line["arm"] == arm]
        assert entry["metrics"]["accuracy"]["mean"] == pytest.approx(sum(scores) / len(scores))
    page = (built.directory / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page
    assert len(built.markdown.encode()) < 80_000


def test_nothing_changed_computes_nothing_and_gives_the_same_bytes(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = inputs.adapter()
    first = report(inputs, adapter)
    monkeypatch.setattr(build_module, "evaluate", lambda *_, **__: pytest.fail("computed again"))
    again = report(inputs, adapter)
    assert again.reused and again.ref == first.ref
    as_champion = report(inputs, adapter, Champion(adapter, None))
    assert as_champion.reused and as_champion.ref == first.ref
    monkeypatch.undo()
    # in an empty store the same inputs give the same artifact
    other = Inputs(inputs.home / "second")
    other.store = ArtifactStore(str(inputs.home / "second" / "artifacts"))
    assert report(other, other.adapter()).ref == first.ref


def test_retrained_adapter_does_not_repeat_the_base_arms(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    champion = inputs.adapter()
    report(inputs, champion)
    asked = count_prompts(monkeypatch)
    built = report(inputs, inputs.adapter(seed=5), Champion(champion, None))
    assert asked == [48], "only the new adapter has to answer"
    assert built.decision["reference"] == "champion"
    assert set(built.summary["arms"]) == {"zero_shot", "few_shot", "adapter", "champion"}


def test_of_a_dataset_that_grew_only_new_rows_are_asked(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    champion, candidate = inputs.adapter(seed=7), inputs.adapter(seed=8)
    all_rows = {"base_rows": None, "gate": {"margin": 0.2}}
    report(inputs, champion, **all_rows, max_rows=30)
    asked = count_prompts(monkeypatch)
    report(inputs, candidate, Champion(champion, None), **all_rows, max_rows=30)
    assert asked == [30], "the candidate; what the base and the champion answered is kept"
    asked.clear()
    built = report(inputs, candidate, Champion(champion, None), **all_rows)
    assert set(asked) == {18}, "each arm answers what is new"
    monkeypatch.undo()
    other = Inputs(inputs.home / "whole")
    arguments = (other, other.adapter(seed=8), Champion(other.adapter(seed=7), None))
    assert report(*arguments, **all_rows).ref == built.ref, "as if all had been asked at once"


def test_a_kept_answer_holds_within_another_limit_only_if_it_ended() -> None:
    ended, cut = Answer("on", 9, 3, True), Answer("on on", 9, 4, False)
    assert [_holds((ended, 4), limit) for limit in (3, 4, 9)] == [False, True, True]
    assert [_holds((cut, 4), limit) for limit in (3, 4, 9)] == [False, True, False]


def test_damaged_reports_and_answers_are_made_again(inputs: Inputs) -> None:
    adapter = inputs.adapter()
    first = report(inputs, adapter)
    answers = [path for path in (inputs.home / "artifacts" / "answers").iterdir() if path.is_dir()]
    for damaged in (first.directory / "rows.jsonl", *(path / "answers.jsonl" for path in answers)):
        damaged.chmod(0o644)
        damaged.write_bytes(b"{}")
    again = report(inputs, adapter)
    assert (again.ref, again.reused) == (first.ref, False) and report(inputs, adapter).reused


def test_the_bare_base_answers_fewer_rows_where_a_champion_decides(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = inputs.home / "more.jsonl"
    held_out = load_rows(inputs.store.open(inputs.dataset), "evaluation")
    ends = [f(held_out, key=lambda row: row["_row"]) for f in (min, max)]  # asked first, and last
    also = [json.dumps({name: row[name] for name in ("text", "label")}) for row in ends]
    path.write_text("\n".join(['{"text": "sing a song for the cat", "label": "impossible"}', *also]))
    few = {"base_rows": 10, "must_pass": path.name}
    champion = inputs.adapter()
    first = report(inputs, champion, **few)
    whole = report(inputs, champion, base_rows=None, must_pass=path.name)
    assert {arm: entry["rows"] for arm, entry in first.summary["arms"].items()} == dict.fromkeys(
        ("zero_shot", "few_shot", "adapter"), 48
    ), "without a champion the bare base decides, on all rows"
    lines = (first.directory / "rows.jsonl").read_text().splitlines()
    assert lines == (whole.directory / "rows.jsonl").read_text().splitlines()

    asked = count_prompts(monkeypatch)
    built = report(inputs, inputs.adapter(seed=6), Champion(champion, None), **few)
    assert asked == [49], "what the bare base answered before is kept"
    assert {arm: entry["rows"] for arm, entry in built.summary["arms"].items()} == {
        "zero_shot": 10, "few_shot": 10, "adapter": 48, "champion": 48,
    }  # fmt: skip
    assert (built.summary["rows"], built.summary["must_pass"]) == (48, 3)
    assert built.decision["difference"]["rows"] == 48
    before = [json.loads(line) for line in lines]
    first_rows = sorted({line["row"] for line in before if line["sampled"]})[:10]
    asked_now = [json.loads(line) for line in (built.directory / "rows.jsonl").read_text().splitlines()]
    assert [line for line in asked_now if line["arm"] == "zero_shot"] == [
        line for line in before if line["arm"] == "zero_shot" and line["row"] in first_rows
    ]
    assert "Base model, asked, 10 rows" in built.markdown
    assert "10 rows</span>" in (built.directory / "report.html").read_text()


def test_answers_by_label_scores(inputs: Inputs) -> None:
    spec = specification(answer_by="label_scores")
    found = train_adapter(
        open_inputs(spec, inputs.store, inputs.bases[0], inputs.dataset), inputs.store, inputs.home
    )
    manifest = json.loads((inputs.store.open(found.ref) / "manifest.json").read_bytes())
    assert (manifest["answer_by"], manifest["labels"]) == ("label_scores", ["off", "on"])
    generating = inputs.adapter()
    assert found.ref != generating, "how it answers is part of an adapter"

    built = report(inputs, found.ref, Champion(generating, None), answer_by="label_scores")
    lines = [json.loads(line) for line in (built.directory / "rows.jsonl").read_text().splitlines()]
    for arm in ("zero_shot", "few_shot", "adapter"):
        answers = [line for line in lines if line["arm"] == arm]
        assert {line["answer"] for line in answers} <= {"off", "on"}
        assert all(line["finished"] for line in answers)
    # the champion answers as it does at the endpoint: it was trained and released to generate
    generated = [line for line in lines if line["arm"] == "champion"]
    plain = report(inputs, generating)
    before = [json.loads(line) for line in (plain.directory / "rows.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in generated] == [
        line["answer"] for line in before if line["arm"] == "adapter"
    ]
    # and the labels of one that was released to choose are those it was trained with
    chosen = report(inputs, generating, Champion(found.ref, None))
    lines = [json.loads(line) for line in (chosen.directory / "rows.jsonl").read_text().splitlines()]
    assert {line["answer"] for line in lines if line["arm"] == "champion"} <= {"off", "on"}


def test_too_many_labels_are_told(inputs: Inputs) -> None:
    spec = specification(answer_by="label_scores")
    many = [{"label": f"label {i}"} for i in range(MAX_LABELS + 1)]
    assert len(answer_labels(spec, many[1:])) == MAX_LABELS
    with pytest.raises(ValueError, match=f"at most {MAX_LABELS} different answers .* found {MAX_LABELS + 1}"):
        answer_labels(spec, many)


@pytest.mark.slow
def test_really_bad_adapters_are_blocked(inputs: Inputs) -> None:
    """Trained for real: on flipped labels, hardly at all, with another prompt; one made for another base is
    refused."""
    champion = Champion(inputs.adapter(), None)
    assert report(inputs, champion.adapter).decision["verdict"] == "promote"
    for name, bad in {
        "flipped labels": inputs.adapter(flipped=True),
        "truncated": inputs.adapter(steps=4),
        "exploded": inputs.adapter(learning_rate=1.0, max_grad_norm=100.0),
    }.items():
        decision = report(inputs, bad, champion).decision
        assert decision["verdict"] == "reject", name
        if name != "truncated":  # it learned to answer one of two labels always: half right, the base is not
            assert report(inputs, bad).decision["verdict"] != "promote", name
    from ml_assets.engine.loading import IncompatibleAdapter

    with pytest.raises(IncompatibleAdapter, match="made for base_identity"):
        report(inputs, inputs.adapter(base=1))


def test_champion_on_another_base_answers_on_its_own(inputs: Inputs) -> None:
    champion = inputs.adapter(base=1)
    built = report(inputs, inputs.adapter(), Champion(champion, inputs.bases[1]))
    assert built.decision["reference"] == "champion"
    assert built.summary["about"]["champion_base"] == inputs.revision(1)
    alone = load_base(inputs.store.open(inputs.bases[1]))
    alone.attach("champion", inputs.store.open(champion))
    evaluation_rows = load_rows(inputs.store.open(inputs.dataset), "evaluation")
    lines, _ = evaluate(
        alone, inputs.spec.prompt, inputs.spec.evaluation, evaluation_rows,
        load_rows(inputs.store.open(inputs.dataset), "train"), [Arm("champion", "champion", champion.digest)],
    )  # fmt: skip
    reported = [json.loads(line) for line in (built.directory / "rows.jsonl").read_text().splitlines()]
    assert [line for line in reported if line["arm"] == "champion"] == lines


def test_must_pass_rows_are_judged_apart(inputs: Inputs) -> None:
    path = inputs.home / "must_pass.jsonl"
    evaluation_row = load_rows(inputs.store.open(inputs.dataset), "evaluation")[0]
    path.write_text(
        json.dumps({"text": evaluation_row["text"], "label": evaluation_row["label"]})
        + '\n\n{"text": "sing a song for the cat", "label": "impossible"}\n'
    )
    built = report(inputs, inputs.adapter(), must_pass="must_pass.jsonl")
    assert built.decision["verdict"] == "reject"
    assert "must-pass: 1 of 2" in built.decision["reasons"][0]
    lines = [json.loads(line) for line in (built.directory / "rows.jsonl").read_text().splitlines()]
    mine = [line for line in lines if line["arm"] == "adapter"]
    assert (len(mine), sum(line["must_pass"] for line in mine), sum(line["sampled"] for line in mine)) == (
        49,
        2,
        48,
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{broken", "line 1: expected a JSON object"),
        ('{"text": "a", "label": "b"}\n[1]', "line 2: expected a JSON object, got list"),
        ('{"text": "a"}', "line 1: column 'label' is missing"),
        ('{"text": "\\ud800", "label": "b"}', "line 1: expected text, found half of a surrogate pair"),
        ("\n", "at least one must-pass row"),
        (None, "expected a readable JSONL file"),
    ],
)
def test_bad_must_pass_file_is_one_clear_error(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "must.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(EvaluationError, match=message) as caught:
        load_must_pass(path, ["text", "label"])
    assert str(path) in str(caught.value)


def test_lines_of_a_must_pass_file_end_where_those_of_json_do(tmp_path: Path) -> None:
    path = tmp_path / "must.jsonl"
    path.write_text('{"text": "one\u2028two\x85", "label": "b"}\r\n{"text": "c", "label": "d"}\n')
    assert len(load_must_pass(path, ["text", "label"])) == 2


def test_segments_are_drawn_as_they_are() -> None:
    arm = {"mean": 0.5, "lower": 0.4, "upper": 0.6}
    values = ("$5_$9", "10% off $5, 20% off $9")
    segments = [{"column": "price", "value": v, "rows": 9, "arms": {"adapter": arm}} for v in values]
    assert segments_plot({"segments": segments, "arms": {"adapter": {}}, "metric": "accuracy"})


def test_rows_examples_and_prompts() -> None:
    spec = specification()
    data = rows()
    assert [row["_row"] for row in select_rows(data[::-1], 5)] == sorted(row["_row"] for row in data)[:5]
    chosen = choose_examples(data, spec.prompt, spec.evaluation)
    assert {row["label"] for row in chosen} == {"on", "off"}, "one of each label"
    assert chosen == choose_examples(data[::-1], spec.prompt, spec.evaluation)
    messages = build_messages(spec.prompt, data[0], chosen)
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2 + ["user"]
    assert messages[:-1] == build_messages(spec.prompt, data[1], chosen)[:-1], "a shared prefix"
    assert len(neutral_texts()) == 6
    assert all(60 <= len(text.split()) <= 100 for text in neutral_texts())


def test_long_prompts(inputs: Inputs) -> None:
    base = load_base(inputs.store.open(inputs.bases[0]))
    long = {"text": "turn on " * 300, "label": "on", "_row": "f" * 64}
    with pytest.raises(EvaluationError, match=f"row {'f' * 64}: the prompt of arm zero_shot has"):
        answer(base, [build_messages(inputs.spec.prompt, long)], [long["_row"]], 8, Arm("zero_shot"))
    examples = [rows()[0], {"text": "turn off " * 120, "label": "off", "_row": "e" * 64}, rows()[1]]
    assert fitting_examples(base, inputs.spec.prompt, rows(), examples, 8) == examples[:1]


def broken_metric(expected: str, answer: str, row: dict[str, Any]) -> float:
    return 2.0


def test_broken_python_metric_names_row_and_metric(inputs: Inputs) -> None:
    metric = {"callable": f"{__name__}:broken_metric"}
    with pytest.raises(MetricError, match=r"row [0-9a-f]{64}: metric .*broken_metric: expected a number"):
        report(inputs, inputs.adapter(), metrics=[metric])
    with pytest.raises(MetricError, match="nowhere:nothing: expected an importable"):
        report(inputs, inputs.adapter(), metrics=[{"callable": "nowhere:nothing"}])


def test_asset_records_everything_and_repeats_nothing(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = inputs.home
    monkeypatch.setenv("EVERGREEN_HOME", str(home))
    partition = inputs.revision(0)
    current = {"adapter": inputs.adapter()}

    @dg.asset(name="base_model", partitions_def=BASE_MODELS)
    def base_model(context: dg.AssetExecutionContext) -> dg.MaterializeResult[ArtifactRef]:
        return dg.MaterializeResult(value=inputs.bases[int(context.partition_key[5:])])

    @dg.asset(key=["switches", "dataset"])
    def dataset() -> dg.MaterializeResult[ArtifactRef]:
        return dg.MaterializeResult(value=inputs.dataset)

    @dg.asset(key=["switches", "adapter"], partitions_def=BASE_MODELS)
    def adapter() -> dg.MaterializeResult[ArtifactRef]:
        return dg.MaterializeResult(value=current["adapter"])

    instance = dg.DagsterInstance.ephemeral()
    instance.add_dynamic_partitions("base_models", [inputs.revision(0), inputs.revision(1)])
    tracking = MlflowTracking()

    def materialize() -> dg.ExecuteInProcessResult:
        return dg.materialize(
            [base_model, dataset, adapter, build_eval_report_asset(inputs.spec, home)],
            instance=instance,
            partition_key=partition,
            resources={
                "artifact_store": ArtifactStoreResource(),
                "mlflow_tracking": tracking,
                "io_manager": ArtifactRefIOManager(),
                "ledger": LedgerResource(),
            },
        )

    first = materialize()
    key = dg.AssetKey(["switches", "eval_report"])
    found = first.asset_materializations_for_node("switches__eval_report")[0].metadata
    assert found["verdict"].value == "promote"
    assert str(found["report"].value).endswith("/artifacts/eval_report/report.html")
    checks = {e.check_name: e for e in first.get_asset_check_evaluations() if e.asset_key == key}
    assert checks["gate"].passed and checks["must_pass"].passed
    assert checks["gate"].partition == partition

    version = tracking.find_version("switches", current["adapter"].digest)
    assert version is not None
    assert version.tags["verdict"] == "promote"
    challenger = tracking.get_alias("switches", "challenger")
    assert challenger is not None and challenger.version == version.version
    client = tracking._connect()
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["eval/adapter/accuracy"] > 0.9
    assert {f.path for f in client.list_artifacts(version.run_id, "eval_report")} == {
        f"eval_report/{name}" for name in ("report.html", "rows.jsonl", "decision.json", "latency.json")
    }

    monkeypatch.setattr(build_module, "evaluate", lambda *_, **__: pytest.fail("computed again"))
    second = materialize()
    again = second.asset_materializations_for_node("switches__eval_report")[0].metadata
    assert again["evaluated_before"].value is True
    assert len(client.search_model_versions("name = 'switches'")) == 1
    monkeypatch.undo()
    monkeypatch.setenv("EVERGREEN_HOME", str(home))

    # the challenger becomes champion; a bad retrain is held against it, and gets no alias
    tracking.set_alias("switches", "champion", version.version)
    current["adapter"] = inputs.adapter(flipped=True)
    third = materialize()
    checks = {e.check_name: e for e in third.get_asset_check_evaluations() if e.asset_key == key}
    assert third.success, "the gate's check does not block"
    assert not checks["gate"].passed
    assert checks["gate"].severity == dg.AssetCheckSeverity.ERROR
    assert "champion" in (checks["gate"].description or "")
    table = third.asset_materializations_for_node("switches__eval_report")[0].metadata["transfer"]
    assert isinstance(table, dg.TableMetadataValue)
    assert list(table.records[0].data) == ["rows_are", "segment", "before", "after", "change", "rows"]
    assert table.records[0].data["segment"] == "all" and table.records[0].data["change"] < 0
    challenger = tracking.get_alias("switches", "challenger")
    assert challenger is not None and challenger.version == version.version
