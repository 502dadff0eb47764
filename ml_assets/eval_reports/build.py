"""One eval report: from artifacts to a published report, or the one that was published before."""

import contextlib
import inspect
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ml_assets.adapters.rungs import Climb
from ml_assets.artifacts import (
    ArtifactError,
    ArtifactRef,
    ArtifactStore,
    canonical_json,
    read_json,
    sha256_bytes,
    sha256_file,
)
from ml_assets.datasets.failures import production_failures
from ml_assets.datasets.snapshot import load_rows
from ml_assets.engine.examples import is_prompted, read_examples
from ml_assets.engine.hosted import HostedModel, open_base
from ml_assets.eval_reports.gate import Decision, better_arm, decide
from ml_assets.eval_reports.metrics import resolve_callable
from ml_assets.eval_reports.report import arm_title, render_html, render_markdown, summarize
from ml_assets.eval_reports.runner import (
    RUNNER_VERSION,
    Answer,
    Arm,
    Row,
    choose_examples,
    default_new_tokens,
    evaluate,
    fitting_examples,
    forgetting,
    load_must_pass,
    now,
    question_of,
    seconds_since,
    select_rows,
)
from ml_assets.spec import CustomizationSpec, PythonMetric

if TYPE_CHECKING:
    from ml_assets.engine.loading import Base

_log = logging.getLogger(__name__)

KIND = "eval_report"
REPORT_VERSION = "5"
"""Raise when the same lines would give another report."""


@dataclass(frozen=True)
class Champion:
    """The adapter that serves. `base_model` is the base it sits on, None when that is the candidate's."""

    adapter: ArtifactRef
    base_model: ArtifactRef | None


@dataclass(frozen=True)
class BuiltReport:
    """A published report. `record` is what may differ between two computations of it: `seconds` per answer,
    what was sent to `hosted` bases ({revision: {"requests", "money"}}), the seconds that it `took`, and when
    it was done (`at`)."""

    ref: ArtifactRef
    directory: Path
    summary: dict[str, Any]
    markdown: str
    record: dict[str, Any]
    reused: bool

    @property
    def decision(self) -> dict[str, Any]:
        return self.summary["decision"]


def report_key(
    spec: CustomizationSpec,
    root: Path,
    adapter: ArtifactRef,
    dataset: ArtifactRef,
    base_model: ArtifactRef,
    champion: str | None,
    compute: str,
    looks: int = 1,
    look: int = 1,
) -> str:
    """64 hex: the hash of all that goes into a report. `champion` is the digest of its adapter."""
    evaluation = spec.evaluation
    code = {
        metric.callable: sha256_file(Path(inspect.getfile(resolve_callable(metric.callable))))
        for metric in evaluation.resolved_metrics()
        if isinstance(metric, PythonMetric)
    }
    must_pass = root / evaluation.must_pass if evaluation.must_pass else None
    parts = {
        "customization": spec.name,
        "prompt": spec.prompt.model_dump(),
        "evaluation": evaluation.model_dump(),
        "failures": spec.feedback.must_pass,
        "must_pass": sha256_file(must_pass) if must_pass and must_pass.is_file() else None,
        "adapter": adapter.digest,
        "dataset": dataset.digest,
        "base_model": base_model.digest,
        "champion": champion,
        "compute": compute,
        "code": [RUNNER_VERSION, REPORT_VERSION, code],
    }
    if looks > 1:
        parts["looks"] = [look, looks]
    if evaluation.cluster:
        parts["design_effect"] = "2"
    if "rouge_l" in evaluation.resolved_metrics():
        parts["rouge_l"] = "2"
    return sha256_bytes(canonical_json(parts))


def build_report(
    spec: CustomizationSpec,
    root: Path,
    store: ArtifactStore,
    home: Path,
    *,
    adapter: ArtifactRef,
    dataset: ArtifactRef,
    base_model: ArtifactRef,
    champion: Champion | None,
    looks: int = 1,
    look: int = 1,
    since: str | None = None,
    paid: dict[str, dict[str, float]] | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> BuiltReport:
    """Evaluate, decide and publish, or find what these inputs gave before. `looks` and `look` are as in
    `decide`. `since`: when this was first begun, in a process that may have been killed; what the answers
    took that are kept from then on counts. `paid` gets what is sent to hosted bases, as in the record, also
    when this fails.

    A candidate that is the champion keeps the report that made it so. `on_progress(arm, done, total)`.

    Raises:
        EvaluationError, MetricError: rows, must-pass rows or metrics that can't be evaluated.
        IncompatibleAdapter: the adapter was made for another base.
        ArtifactError: an input is damaged.
    """
    from ml_assets.engine import hardware

    compute = hardware.hardware_class(home)
    serving = champion.adapter.digest if champion else None
    key = report_key(spec, root, adapter, dataset, base_model, serving, compute, looks, look)
    if built := _recalled(store, key):
        return built
    if serving == adapter.digest:
        champion = None

    started = time.monotonic()
    hardware.prepare_process()
    spent = {} if paid is None else paid
    kept: list[Answer] = []
    with hardware.computing(home):
        lines, decision, seconds, about, known = _evaluate(
            spec,
            root,
            store,
            home,
            compute,
            adapter,
            dataset,
            base_model,
            champion,
            on_progress,
            (look, looks),
            spent,
            kept,
        )
    summary = summarize(lines, spec.evaluation, decision, about, known)
    ref = _publish(store, summary, lines)
    took = time.monotonic() - started + (0.0 if since is None else seconds_since(kept, since))
    record = {"seconds": seconds, "hosted": spent, "took": round(took, 3), "at": now()}
    store.remember(KIND, key, ref, record)
    once_serving = report_key(spec, root, adapter, dataset, base_model, adapter.digest, compute)
    store.remember(KIND, once_serving, ref, record)
    return _opened(store, ref, record, reused=False)


def _publish(store: ArtifactStore, summary: dict[str, Any], lines: list[Row]) -> ArtifactRef:
    text = "".join(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n" for line in lines)
    return store.publish(
        KIND,
        {
            "rows.jsonl": text.encode(),
            "decision.json": canonical_json(summary["decision"]) + b"\n",
            "summary.json": canonical_json(summary) + b"\n",
            "summary.md": render_markdown(summary).encode(),
            "report.html": render_html(summary, lines).encode(),
        },
    )


def with_climb(
    built: BuiltReport,
    climb: Climb,
    spec: CustomizationSpec,
    root: Path,
    store: ArtifactStore,
    home: Path,
) -> BuiltReport:
    """The report of an adapter that the port ladder gave, with all rungs that were tried: the same lines and
    the same decision. Made once for the same climb; `reused` stays what it is, since nothing is evaluated."""
    from ml_assets.engine import hardware

    body = climb.table()
    key = sha256_bytes(canonical_json({"report": built.ref.digest, "climb": body, "code": REPORT_VERSION}))
    if known := _recalled(store, key):
        return replace(known, reused=built.reused)
    text = (built.directory / "rows.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.split("\n") if line]
    ref = _publish(store, built.summary | {"climb": body}, lines)
    store.remember(KIND, key, ref, built.record)
    about, compute = built.summary["about"], hardware.hardware_class(home)
    adapter, dataset = ArtifactRef("adapter", about["candidate"]), ArtifactRef("dataset", about["dataset"])
    base_model = ArtifactRef("base_model", about["base_model"])
    once_serving = report_key(spec, root, adapter, dataset, base_model, adapter.digest, compute)
    store.remember(KIND, once_serving, ref, built.record)
    return _opened(store, ref, built.record, built.reused)


def _recalled(store: ArtifactStore, key: str) -> BuiltReport | None:
    """The report that was published under this key; None where there is none, or it is damaged."""
    if known := store.recall(KIND, key):
        try:
            return _opened(store, *known, reused=True)
        except ArtifactError as error:
            _log.warning("reported again, because what was published is damaged: %s", error)
    return None


def _opened(store: ArtifactStore, ref: ArtifactRef, record: dict[str, Any], reused: bool) -> BuiltReport:
    directory = store.open(ref)
    summary = json.loads((directory / "summary.json").read_bytes())
    markdown = (directory / "summary.md").read_text(encoding="utf-8")
    return BuiltReport(ref, directory, summary, markdown, record, reused)


def _evaluate(
    spec: CustomizationSpec,
    root: Path,
    store: ArtifactStore,
    home: Path,
    compute: str,
    adapter: ArtifactRef,
    dataset: ArtifactRef,
    base_model: ArtifactRef,
    champion: Champion | None,
    on_progress: Callable[[str, int, int], None] | None,
    look: tuple[int, int],
    spent: dict[str, dict[str, float]],
    kept: list[Answer],
) -> tuple[list[Row], Decision, dict[str, list[float] | None], dict[str, Any], set[str]]:
    evaluation = spec.evaluation
    questions = _Questions.of(spec, root, store, dataset, compute, on_progress, kept)
    rows, train_rows, must_pass = questions.rows, questions.train_rows, questions.must_pass

    base = open_base(store.open(base_model), home)
    base.attach("adapter", store.open(adapter))
    bare_arms = [Arm("zero_shot")]
    if evaluation.few_shot:
        tokens = evaluation.max_new_tokens or default_new_tokens(base, spec.prompt, train_rows)
        examples = choose_examples(train_rows, spec.prompt, evaluation, spec.adapter.seed)
        examples = fitting_examples(
            base, spec.prompt, [*rows, *must_pass, *questions.failures], examples, tokens
        )
        if examples:
            bare_arms.append(Arm("few_shot", examples=examples))
    candidate = adapter_arm("adapter", adapter, store.open(adapter))
    # where a champion decides, the bare base only shows what an adapter is for
    few = questions.first(evaluation.base_rows) if champion else questions
    with _noted(spent, base):
        lines, seconds = few.ask(base, bare_arms)
        more, more_seconds = questions.ask(base, [candidate])
    lines, seconds = lines + more, seconds | more_seconds
    forgotten = 0.0 if isinstance(base, HostedModel) or not candidate.adapter else forgetting(base, "adapter")
    revision = base.manifest["revision"]

    served: dict[str, Any] = {}
    known: set[str] = set()
    if champion is not None:
        folder = store.open(champion.adapter)
        served = read_json(folder / "manifest.json")
        known = _evaluation_rows(store, served["dataset"])
        if champion.base_model is not None:
            del base  # two bases in memory at once may be more than there is
            base = open_base(store.open(champion.base_model), home)
        with _noted(spent, base):
            more, more_seconds = questions.ask_champion(base, champion.adapter, folder)
        lines, seconds = lines + more, seconds | more_seconds

    by_arm = {name: [line for line in lines if line["arm"] == name] for name in seconds}
    bare = {name: by_arm[name] for name in ("few_shot", "zero_shot") if name in by_arm}
    best_bare = better_arm(bare, evaluation)
    decision = decide(
        by_arm["adapter"],
        by_arm["champion"] if champion else by_arm[best_bare],
        evaluation,
        against="champion" if champion else "base",
        forgetting=forgotten,
        labels_from_champion=any(row.get("_origin") == "champion" for row in rows),
        look=look[0],
        looks=look[1],
    )
    both = {line["row"] for line in bare[best_bare]}
    beside = [line for line in by_arm["adapter"] if line["row"] in both]
    if champion and better_arm({best_bare: bare[best_bare], "adapter": beside}, evaluation) == best_bare:
        note = f"the {arm_title(best_bare).lower()}, scores at least as high without any adapter"
        decision = replace(decision, notes=[*decision.notes, note])
    about = {
        "customization": spec.name,
        "base_revision": revision,
        "base_model": base_model.digest,
        "candidate": adapter.digest,
        "champion": champion.adapter.digest if champion else None,
        "champion_base": served.get("base_revision"),
        "dataset": dataset.digest,
        "few_shot_examples": next((len(arm.examples) for arm in bare_arms if arm.name == "few_shot"), 0),
        "computed_with": compute,
    }
    return lines, decision, seconds, about, known


def champion_lines(
    spec: CustomizationSpec,
    root: Path,
    store: ArtifactStore,
    home: Path,
    dataset: ArtifactRef,
    champion: Champion,
    kept: list[Answer],
    on_progress: Callable[[str, int, int], None] | None = None,
) -> list[Row]:
    """What a champion on a base of its own answers to the evaluation rows: as in the reports that compare
    with it. `kept` gets the answers that were kept from before. Raises what `build_report` raises."""
    from ml_assets.engine import hardware
    from ml_assets.engine.loading import load_base

    assert champion.base_model is not None
    compute = hardware.hardware_class(home)
    questions = _Questions.of(spec, root, store, dataset, compute, on_progress, kept)
    base = load_base(store.open(champion.base_model), hardware.compute_dtype(home))
    return questions.ask_champion(base, champion.adapter, store.open(champion.adapter))[0]


@dataclass(frozen=True)
class _Questions:
    """The rows of an evaluation, who keeps the answers to them, and those that were kept before."""

    spec: CustomizationSpec
    store: ArtifactStore
    compute: str
    train_rows: Sequence[Mapping[str, Any]]
    rows: Sequence[Mapping[str, Any]]
    must_pass: Sequence[Mapping[str, Any]]
    failures: Sequence[Mapping[str, Any]]
    columns: Sequence[str]
    on_progress: Callable[[str, int, int], None] | None
    kept: list[Answer]

    @classmethod
    def of(
        cls,
        spec: CustomizationSpec,
        root: Path,
        store: ArtifactStore,
        dataset: ArtifactRef,
        compute: str,
        on_progress: Callable[[str, int, int], None] | None,
        kept: list[Answer],
    ) -> "_Questions":
        evaluation, directory = spec.evaluation, store.open(dataset)
        rows = select_rows(load_rows(directory, "evaluation"), evaluation.max_rows)
        columns = list(dict.fromkeys(c for named in spec.prompt.columns().values() for c in named))
        must_pass = load_must_pass(root / evaluation.must_pass, columns) if evaluation.must_pass else []
        train_rows, held_out = load_rows(directory, "train"), load_rows(directory, "evaluation")
        failures = production_failures([*train_rows, *held_out], spec.feedback.must_pass)
        return cls(spec, store, compute, train_rows, rows, must_pass, failures, columns, on_progress, kept)

    def first(self, count: int | None) -> "_Questions":
        """The first `count` sampled rows, with those of the others that are the same."""
        if count is None or count >= len(self.rows):
            return self
        prompt, rows = self.spec.prompt, self.rows[:count]
        here = {question_of(prompt, row) for row in rows}
        must_pass, failures = (
            [row for row in some if question_of(prompt, row) in here]
            for some in (self.must_pass, self.failures)
        )
        return replace(self, rows=rows, must_pass=must_pass, failures=failures)

    def ask(
        self, base: "Base | HostedModel", arms: list[Arm], asked_with: Mapping[str, Any] | None = None
    ) -> tuple[list[Row], dict[str, list[float] | None]]:
        return evaluate(
            base,
            self.spec.prompt,
            self.spec.evaluation,
            self.rows,
            self.train_rows,
            arms,
            must_pass=self.must_pass,
            failures=self.failures,
            asked_with=asked_with,
            store=self.store,
            compute=self.compute,
            kept_before=self.kept,
            on_progress=self.on_progress,
        )

    def ask_champion(
        self, base: "Base | HostedModel", adapter: ArtifactRef, folder: Path
    ) -> tuple[list[Row], dict[str, list[float] | None]]:
        """The champion is asked what it was trained on, if today's rows still have it."""
        base.attach("champion", folder)
        asked = read_json(folder / "manifest.json").get("prompt") or None
        if asked and not all(c in self.columns for c in _columns(asked)):
            asked = None
        return self.ask(base, [adapter_arm("champion", adapter, folder)], asked)


@contextlib.contextmanager
def _noted(spent: dict[str, dict[str, float]], base: "Base | HostedModel") -> Iterator[None]:
    """What is sent to a hosted base inside, and what it costs, also when it fails."""
    try:
        yield
    finally:
        if isinstance(base, HostedModel) and base.sent:
            spent[base.manifest["revision"]] = {"requests": base.sent, "money": round(base.money, 6)}


def _evaluation_rows(store: ArtifactStore, dataset: str) -> set[str]:
    """The rows that a champion was evaluated on when it was new; none where its dataset is gone."""
    try:
        rows = load_rows(store.open(ArtifactRef("dataset", dataset)), "evaluation")
    except ArtifactError:
        return set()
    return {row["_row"] for row in rows}


def adapter_arm(name: Literal["adapter", "champion"], ref: ArtifactRef, directory: Path) -> Arm:
    """The arm of an adapter that is attached under the arm's name. One without weights is its base with
    examples: what the base answered before to the same prompts need not be computed again."""
    manifest = read_json(directory / "manifest.json")
    if is_prompted(manifest):
        return Arm(name, labels=_labels(manifest), shots=read_examples(directory, manifest))
    return Arm(name, name, ref.digest, labels=_labels(manifest))


def _labels(manifest: Mapping[str, Any]) -> list[str]:
    """What an adapter chooses its answers from: here as at the endpoint, whatever the YAML says now."""
    return manifest["labels"] if manifest.get("answer_by") == "label_scores" else []


def _columns(prompt: Mapping[str, Any]) -> list[str]:
    from ml_assets.spec import template_columns

    return [c for name in ("system", "user") if prompt.get(name) for c in template_columns(prompt[name])]
