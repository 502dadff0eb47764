"""The port ladder: carries a customization to another base, cheapest way first, until the gate accepts one.

Everything that decides before the gate is measured on the validation rows, a part of the training rows that
the short trainings leave out. The frozen rows are looked at once per rung that is shown, and each look has
its share of the gate's alpha: how many looks there may be is settled before the first one. What is found is
kept rung by rung, so that a climb that was killed goes on where it was, and the same inputs never climb
twice.
"""

import contextlib
import dataclasses
import datetime
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ml_assets.adapters.kind import resolve_kind
from ml_assets.adapters.port import (
    MIN_VALIDATION,
    POOL,
    PORT_VERSION,
    SCRATCH,
    TEACHER,
    Port,
    Starts,
    find_starts,
    losses_of,
    same_tokenizer,
    split_validation,
    teacher,
)
from ml_assets.adapters.prompted import PROMPTED_VERSION, publish_prompted
from ml_assets.adapters.recipe import training_examples
from ml_assets.adapters.rungs import Climb, RungResult
from ml_assets.adapters.train import KIND as ADAPTER
from ml_assets.adapters.train import (
    UNTRAINABLE,
    AdapterInputs,
    TrainedAdapter,
    open_inputs,
    recall_adapter,
    train_adapter,
)
from ml_assets.artifacts import (
    ArtifactError,
    ArtifactRef,
    ArtifactStore,
    canonical_json,
    read_json,
    sha256_bytes,
)
from ml_assets.datasets.snapshot import load_rows
from ml_assets.engine.examples import is_prompted
from ml_assets.eval_reports.build import KIND as REPORT
from ml_assets.eval_reports.build import (
    BuiltReport,
    Champion,
    adapter_arm,
    build_report,
    champion_lines,
    report_key,
)
from ml_assets.eval_reports.gate import Difference, is_sampled, rows_for_equal, share_alpha
from ml_assets.eval_reports.metrics import metric_name
from ml_assets.eval_reports.runner import Answer, now, seconds_since
from ml_assets.eval_reports.statistics import mean_bounds
from ml_assets.spec import AdapterRecipe, CustomizationSpec, PromptSpec, RungName

LADDER_VERSION = "6"
"""Raise when the same inputs would climb in another way."""
KIND = "climb"

MIN_SCREEN_ROWS, SCREEN_ROWS, SCREEN_SHARE = 16, 48, 0.08
"""Validation rows that are answered to see whether a look at the frozen rows would be a waste: as many as
this share of those, within the limits."""
START_ROWS = 32
"""Validation rows by whose loss starts are compared, all on the same ones: between starts that need more to
be told apart the choice matters little, and it is much of what a climb costs that ends at the copy."""
SCREEN_ALPHA = 0.025
"""Chance that a rung is not shown although it is as good as the champion."""
HOPELESS, MAPPED = 0.5, 0.9
"""Of what the champion's adapter gains in nats per validation answer: with less a rung is not shown, nor,
below the second, an adapter that was mapped to other shapes and not tuned."""
CLOSE, CLOSE_SHARE = 1.25, 0.5
"""A copy is shown when its loss is at most so many times the champion's on its own base, or above it by at
most so many nats per answer as this share of the gate's margin: an answer that turns wrong costs about a nat.
A worse one is tuned first: a look that it would not stand costs half of alpha, too."""
EVEN = 0.5
"""A climb goes on while an adapter as good as the champion would be accepted with this probability."""
DISTIL_SHARE = 0.3
"""Of the steps of a full training, for distillation; never less than the short tune's."""
OVERHEAD = 0.10
"""On a base with another tokenizer, all rungs before the full training together cost at most this share of it
and its evaluation: little of the adapter can be carried there (docs/migration.md)."""

_log = logging.getLogger(__name__)


class NotCarried(ValueError):
    """No rung of `migration.rungs` gave an adapter; the message has each one's reason."""


@dataclass(frozen=True)
class Climbed:
    """The adapter that the climb gives, and how it came about. `seconds`: device seconds of this call."""

    adapter: TrainedAdapter
    climb: Climb
    seconds: float


def climb(
    spec: CustomizationSpec,
    root: Path,
    store: ArtifactStore,
    home: Path,
    *,
    base_model: ArtifactRef,
    dataset: ArtifactRef,
    champion: Champion,
    run_id: str = "",
    tell: Callable[[str], None] = _log.info,
    on_progress: Callable[[Any], None] | None = None,
    checkpoint_seconds: float = 30.0,
) -> Climbed:
    """Carry `champion` (with the base it sits on) to `base_model`, or find what these inputs gave before.

    The adapter is the first that the gate accepts as non-inferior to the champion on its own base; where it
    accepts none, the best by the deciding metric. `root` is where the path of must-pass rows starts, `tell`
    gets a line about each rung, `on_progress` an `ml_assets.engine.training.Progress`.

    Raises:
        NotCarried: no rung gave an adapter.
        EvaluationError, MetricError: rows or metrics that can't be evaluated.
        ArtifactError: an input is damaged or gone.
    """
    return _Climber(
        spec,
        root,
        store,
        home,
        base_model,
        dataset,
        champion,
        run_id,
        tell,
        on_progress,
        checkpoint_seconds,
    ).run()


def trained_before(inputs: AdapterInputs, store: ArtifactStore, kind: str) -> TrainedAdapter | None:
    """What a full training on these inputs gave before; `kind`: the champion's, for `adapter.kind: auto`."""
    if inputs.spec.adapter.kind == "auto" and kind != "prompt":
        inputs = _with_kind(inputs, kind)
    return recall_adapter(store, inputs.key)


def known_climb(
    spec: CustomizationSpec,
    root: Path,
    store: ArtifactStore,
    home: Path,
    *,
    base_model: ArtifactRef,
    dataset: ArtifactRef,
    champion: Champion | None,
) -> Climb | None:
    """The climb that these inputs gave; None where there was none."""
    if champion is None or champion.base_model is None:
        return None
    return _recall_climb(store, climb_key(spec, root, home, base_model, dataset, champion))


def climb_key(
    spec: CustomizationSpec,
    root: Path,
    home: Path,
    base_model: ArtifactRef,
    dataset: ArtifactRef,
    champion: Champion,
) -> str:
    """64 hex: the hash of all that goes into a climb."""
    from ml_assets.engine import hardware
    from ml_assets.engine.training import TRAINING_VERSION

    assert champion.base_model is not None
    compute = hardware.hardware_class(home)
    migration = spec.migration.model_dump(include={"rungs", "tune_share", "validation_share"})
    report = report_key(
        spec, root, champion.adapter, dataset, base_model, champion.base_model.digest, compute
    )
    code = [LADDER_VERSION, PORT_VERSION, PROMPTED_VERSION, TRAINING_VERSION]
    parts = {"report": report, "recipe": spec.adapter.model_dump(), "migration": migration, "code": code}
    return sha256_bytes(canonical_json(parts))


def _recall_climb(store: ArtifactStore, key: str) -> Climb | None:
    found = _recall(store, key, "whole")
    return Climb.from_json(found) if found else None


def _recall(store: ArtifactStore, key: str, part: str) -> dict[str, Any] | None:
    known = store.recall(KIND, sha256_bytes(f"{key} {part}".encode()))
    if known is None:
        return None
    try:
        return read_json(store.open(known[0]) / f"{part}.json")
    except ArtifactError as error:
        _log.warning("%s again, because what was published is damaged: %s", part, error)
        return None


def _remember(store: ArtifactStore, key: str, part: str, value: Mapping[str, Any]) -> None:
    ref = store.publish(KIND, {f"{part}.json": canonical_json(value) + b"\n"})
    store.remember(KIND, sha256_bytes(f"{key} {part}".encode()), ref, {})


@dataclass
class _Plan:
    """What is settled before the first look at the frozen rows. `settled` are rungs that get none, `losses`
    the mean nats per validation answer on the new base by start (`scratch`: no adapter), `champion` that of
    the champion on its own base, `level` the champion's mean of the deciding metric on the frozen rows."""

    settled: dict[str, dict[str, Any]]
    losses: dict[str, float]
    champion: float | None
    level: float
    bare: dict[str, Any] | None
    training_seconds: dict[str, float]
    screen_seconds: dict[str, float]
    level_seconds: float
    looks: int

    def start(self) -> str:
        """The start with the lowest loss."""
        return min(self.losses, key=lambda name: (self.losses[name], name != SCRATCH, name))

    def gained(self, loss: float) -> float | None:
        """Of what the champion's adapter gains against the bare new base; None where it gains nothing."""
        if self.champion is None or SCRATCH not in self.losses or self.champion >= self.losses[SCRATCH]:
            return None
        return (self.losses[SCRATCH] - loss) / (self.losses[SCRATCH] - self.champion)


@dataclass
class _Climber:
    spec: CustomizationSpec
    root: Path
    store: ArtifactStore
    home: Path
    base_model: ArtifactRef
    dataset: ArtifactRef
    champion: Champion
    run_id: str
    tell: Callable[[str], None]
    on_progress: Callable[[Any], None] | None
    checkpoint_seconds: float
    spent: float = 0.0
    kept: list[Answer] = field(default_factory=list)

    def run(self) -> Climbed:
        from ml_assets.engine import hardware

        assert self.champion.base_model is not None
        self.key = climb_key(self.spec, self.root, self.home, self.base_model, self.dataset, self.champion)
        if known := _recall_climb(self.store, self.key):
            with contextlib.suppress(ArtifactError):
                return Climbed(self._chosen(known.rungs), known, 0.0)
        self.began = self._began()
        hardware.prepare_process()
        self.parent = read_json(self.store.open(self.champion.adapter) / "manifest.json")
        self.parent_base = self.store.open(self.champion.base_model)
        inputs = open_inputs(self.spec, self.store, self.base_model, self.dataset)
        if self.spec.adapter.kind == "auto" and not is_prompted(self.parent):
            inputs = _with_kind(inputs, self.parent["kind"])
        self.inputs = inputs
        self.rows, held = split_validation(
            load_rows(inputs.dataset_directory, "train"), self.spec.migration.validation_share
        )
        self.held = held
        with hardware.computing(self.home):
            plan = self._plan()
        results: list[RungResult] = []
        for rung in self.spec.migration.rungs:
            results.append(self._tried(rung, plan, results))
            if results[-1].verdict == "promote" or results[-1].rows_missing:
                break
        results = self._shown_at_last(results, plan)
        chosen = self._chosen(results)
        full_seconds, full_from = self._full(results)
        found = Climb(
            climb=self.key,
            customization=self.spec.name,
            base_revision=inputs.base_manifest["revision"],
            champion_digest=self.champion.adapter.digest,
            champion_base=self.parent["base_revision"],
            dataset_digest=self.dataset.digest,
            rungs=tuple(results),
            full_seconds=full_seconds,
            full_from=full_from,
            run_id=self.run_id,
        )
        _remember(self.store, self.key, "whole", dataclasses.asdict(found))
        return Climbed(chosen, found, self.spent)

    def _began(self, part: str = "") -> str:
        """When this climb, or a part of it, was first begun: what was made since was made for it, also before
        a kill."""
        name = f"{part}-began" if part else "began"
        known = _recall(self.store, self.key, name)
        if known is None:
            at = now() if part else datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            known = {"at": at}
            _remember(self.store, self.key, name, known)
        return known["at"]

    # -- before the first look -------------------------------------------------------------------------

    def _plan(self) -> _Plan:
        if known := _recall(self.store, self.key, "plan"):
            return _Plan(**known)
        rungs = self.spec.migration.rungs
        known = _recall(self.store, self.key, "planned")  # by a process that was killed
        plan = _Plan(**known) if known else _Plan({}, {}, None, 0.0, None, {}, {}, 0.0, 1)
        if not known:
            # in full, whichever climb had them first: the saving must not depend on the order of climbs
            with self._timed(since="") as seconds:
                plan.level = self._level()
            plan.level_seconds = seconds()
            _remember(self.store, self.key, "planned", dataclasses.asdict(plan))
        if "bare" in rungs and plan.bare is None:
            self._plan_bare(plan)
            _remember(self.store, self.key, "planned", dataclasses.asdict(plan))
        if not same_tokenizer(self.inputs.base_directory, self.parent_base):
            self._within(plan, self._screen_rows() * (1 + bool(self.spec.evaluation.few_shot)))
        if {"copy", "tune", "distil"} & set(rungs):
            self._plan_copy(plan)
        plan.looks = max(1, len([rung for rung in rungs if rung not in plan.settled]))
        _remember(self.store, self.key, "plan", dataclasses.asdict(plan))
        return plan

    def _settle(
        self, plan: _Plan, rung: RungName, start: str, verdict: Any, reason: str, **more: Any
    ) -> None:
        plan.settled[rung] = dataclasses.asdict(
            RungResult(
                rung,
                start,
                verdict,
                reason,
                training_seconds=plan.training_seconds.get(rung, 0.0),
                evaluation_seconds=plan.screen_seconds.get(rung, 0.0),
                screen_seconds=plan.screen_seconds.get(rung, 0.0),
                **more,
            )
        )

    def _level(self) -> float:
        lines = champion_lines(
            self.spec, self.root, self.store, self.home, self.dataset, self.champion, self.kept
        )
        return _mean([line["scores"][self._metric] for line in lines if is_sampled(line)])

    def _plan_bare(self, plan: _Plan) -> None:
        """Zero-shot or few-shot, the better one on validation rows."""
        shots: list[Literal["zero_shot", "few_shot"]] = ["zero_shot"]
        if self.spec.evaluation.few_shot:
            shots.append("few_shot")
        made: dict[str, TrainedAdapter] = {}
        plan.training_seconds["bare"] = 0.0
        for name in shots:
            with self._timed() as seconds:
                made[name] = publish_prompted(self.inputs, self.store, self.home, name)
            plan.training_seconds["bare"] += self._took(made[name], seconds())
        with self._timed(self._began("bare-screen")) as seconds:
            scores = {name: self._screened(adapter.ref) for name, adapter in made.items()}
        plan.screen_seconds["bare"] = seconds()
        best = max(scores, key=lambda name: (_mean(scores[name]), name == "zero_shot"))
        plan.bare = {"shots": best, "digest": made[best].ref.digest}
        if reason := self._hopeless(scores[best], plan.level):
            self._settle(plan, "bare", best, "not shown", reason, adapter_digest=made[best].ref.digest)

    def _plan_copy(self, plan: _Plan) -> None:
        """Measure every start on validation rows."""
        ported: tuple[RungName, ...] = ("copy", "tune", "distil")
        wanted: list[RungName] = [rung for rung in ported if rung in self.spec.migration.rungs]
        copies, reason = same_tokenizer(self.inputs.base_directory, self.parent_base), ""
        if not copies:
            reason = (
                "another tokenizer or chat template: what the adapter does to its tokens means nothing here"
            )
        if len(self.held) < MIN_VALIDATION:
            reason = (
                f"{len(self.rows) + len(self.held)} training rows: too few to leave some out for validation"
            )
        skipped: list[RungName] = [
            rung for rung in wanted if reason and (rung == "copy" or len(self.held) < MIN_VALIDATION)
        ]
        none = ""
        if any(rung not in plan.settled and rung not in skipped for rung in wanted):
            with self._timed() as seconds:
                none = self._measure_starts(plan, copies)
            plan.training_seconds[next(rung for rung in wanted if rung not in plan.settled)] = seconds()
        for rung in skipped:  # only now: what was measured is in the first one's costs
            self._settle(plan, rung, "", "skipped", reason)
        if "copy" not in wanted or "copy" in plan.settled:
            return None
        starts = [name for name in plan.losses if name != SCRATCH]
        if not starts:
            return self._settle(plan, "copy", "", "skipped", none)
        best = min(starts, key=lambda name: plan.losses[name])
        loss, bare, gained = plan.losses[best], plan.losses[SCRATCH], plan.gained(plan.losses[best])
        least = MAPPED if best == "mapped" else HOPELESS
        measured = f"{loss:.3f} nats per validation answer with the {best}, {bare:.3f} without"
        if loss >= bare:
            self._settle(plan, "copy", best, "not shown", f"worse than no adapter: {measured}")
        elif gained is not None and gained < least:
            self._settle(
                plan,
                "copy",
                best,
                "not shown",
                f"{gained:.0%} of what the champion gains, {least:.0%} is the least to be shown: {measured}",
            )
        elif (
            "tune" in wanted
            and plan.champion is not None
            and loss
            > max(CLOSE * plan.champion, plan.champion + CLOSE_SHARE * self.spec.evaluation.gate.margin)
        ):
            self._settle(
                plan,
                "copy",
                best,
                "not shown",
                f"{loss:.3f} nats per validation answer with the {best}, {plan.champion:.3f} with the "
                "champion on its own base: it is tuned first",
            )
        return None

    def _measure_starts(self, plan: _Plan, copies: bool) -> str:
        """Why there is no start but `scratch`, if there is none."""
        from ml_assets.engine import hardware
        from ml_assets.engine.loading import load_base

        assert self.champion.base_model is not None
        base = load_base(self.inputs.base_directory, hardware.compute_dtype(self.home))
        found = Starts()
        if copies:
            found = find_starts(
                self.inputs, base, self.store, self.home, self.champion.adapter, self.champion.base_model
            )
        examples = training_examples(base, self.spec.prompt, self.held[:START_ROWS])
        for name, folder in [(SCRATCH, None), *found.folders.items()]:
            plan.losses[name] = _mean(losses_of(base, folder, examples))
        del base
        if found.folders:
            plan.champion = self._champion_loss()
        return found.reason

    def _champion_loss(self) -> float:
        assert self.champion.base_model is not None
        with teacher(self.store, self.home, self.champion.adapter, self.champion.base_model) as old:
            examples = training_examples(old, PromptSpec(**self.parent["prompt"]), self.held[:START_ROWS])
            pairs = [(example.prompt, example.target) for example in examples]
            from ml_assets.engine.scoring import answer_losses

            with old.active(TEACHER):
                return _mean(answer_losses(old, pairs))

    def _within(self, plan: _Plan, answers: int) -> None:
        """On a base with another tokenizer, settle the short trainings that can't be had for OVERHEAD of a
        full training and its evaluation, by what is predicted. `answers`: validation rows answered."""
        full, _ = self._predicted_full()
        asked = plan.screen_seconds.get("bare", 0.0)
        spent = asked + sum(plan.training_seconds.values())
        short: tuple[RungName, ...] = ("tune", "distil")
        for rung in short:
            if rung not in self.spec.migration.rungs:
                continue
            reason = "another tokenizer, and nothing here tells what a training and its evaluation would cost"
            if full is not None and answers and asked:
                each = asked / answers
                evaluation = each * (
                    self._frozen_rows() + self._base_rows() * (1 + bool(self.spec.evaluation.few_shot))
                )
                extra = self._share(rung) * POOL * full + each * (self._frozen_rows() + self._screen_rows())
                spent += extra
                if spent <= OVERHEAD * (full + evaluation):
                    continue
                reason = (
                    f"another tokenizer: with it the climb would spend about {spent:.0f} s before a full "
                    f"training and its evaluation of about {full + evaluation:.0f} s, allowed are "
                    f"{OVERHEAD:.0%}"
                )
                spent -= extra
            self._settle(plan, rung, "", "skipped", reason)

    def _frozen_rows(self) -> int:
        count = len(load_rows(self.inputs.dataset_directory, "evaluation"))
        return min(count, self.spec.evaluation.max_rows or count)

    def _base_rows(self) -> int:
        """Frozen rows that each base arm of a report answers."""
        return min(self._frozen_rows(), self.spec.evaluation.base_rows or self._frozen_rows())

    def _screen_rows(self) -> int:
        """Validation rows that are answered: few against the frozen ones, or looking would cost less."""
        return min(
            len(self.held), SCREEN_ROWS, max(MIN_SCREEN_ROWS, round(SCREEN_SHARE * self._frozen_rows()))
        )

    def _share(self, rung: str) -> float:
        """Of a full training's steps."""
        share = self.spec.migration.tune_share
        return {"copy": 0.0, "tune": share}.get(rung, max(DISTIL_SHARE, share))

    # -- rungs -----------------------------------------------------------------------------------------

    def _tried(self, rung: RungName, plan: _Plan, before: Sequence[RungResult]) -> RungResult:
        known = plan.settled.get(rung) or _recall(self.store, self.key, rung)
        result = RungResult(**known) if known else None
        if result is None or not self._kept(result):
            result = self._made_again(result, plan, before) if result else self._try(rung, plan, before)
            if rung not in plan.settled:
                _remember(self.store, self.key, rung, dataclasses.asdict(result))
        name = f"{rung} ({result.start})" if result.start else rung
        self.tell(f"{self.spec.name}, {name}: {result.verdict}: {result.reason}")
        return result

    def _kept(self, result: RungResult) -> bool:
        """Whether what a rung gave can be opened; where its report can't, that is made anew."""
        from ml_assets.engine import hardware

        if result.adapter_digest is None:
            return True
        adapter = ArtifactRef(ADAPTER, result.adapter_digest)
        try:
            self._published(adapter)
            if result.report_digest:
                self.store.open(ArtifactRef(REPORT, result.report_digest))
        except ArtifactError as error:
            _log.warning("%s again, because what was published is damaged: %s", result.rung, error)
            serving, compute = self.champion.adapter.digest, hardware.hardware_class(self.home)
            place = (adapter, self.dataset, self.base_model, serving, compute, result.looks, result.look)
            self.store.forget(REPORT, report_key(self.spec, self.root, *place))
            return False
        return True

    def _made_again(self, lost: RungResult, plan: _Plan, before: Sequence[RungResult]) -> RungResult:
        """A rung whose adapter or report was lost. Its costs stay what they were: the accident is no part."""
        if lost.rung in plan.settled:
            adapter = self._train(lost.rung, lost.start, plan, before)
            return replace(lost, adapter_digest=adapter.ref.digest)
        return replace(
            self._try(lost.rung, plan, before),
            training_seconds=lost.training_seconds,
            evaluation_seconds=lost.evaluation_seconds,
            screen_seconds=lost.screen_seconds,
        )

    def _try(self, rung: RungName, plan: _Plan, before: Sequence[RungResult]) -> RungResult:
        start = {"bare": (plan.bare or {}).get("shots", ""), "full": SCRATCH}.get(rung) or self._start(
            rung, plan
        )
        result = RungResult(
            rung,
            start,
            "skipped",
            "",
            training_seconds=plan.training_seconds.get(rung, 0.0),
            evaluation_seconds=plan.screen_seconds.get(rung, 0.0),
            screen_seconds=plan.screen_seconds.get(rung, 0.0),
        )
        with self._timed() as seconds:
            try:
                trained = self._train(rung, start, plan, before)
            except UNTRAINABLE as error:
                spent = result.training_seconds + seconds()
                return replace(result, reason=str(error), training_seconds=spent)
        manifest = read_json(self.store.open(trained.ref) / "manifest.json")
        result = replace(
            result,
            adapter_digest=trained.ref.digest,
            start=self._origin(manifest, start),
            steps=manifest["steps"],
            # a prompt's are in the plan
            training_seconds=result.training_seconds
            + (0.0 if rung == "bare" else self._took(trained, seconds())),
        )
        if rung not in ("bare", "full"):
            with self._timed(self._began(f"{rung}-screen")) as seconds:
                reason = self._waste(rung, trained, plan, before)
            result = replace(
                result,
                evaluation_seconds=result.evaluation_seconds + seconds(),
                screen_seconds=result.screen_seconds + seconds(),
            )
            if reason:
                return replace(result, verdict="not shown", reason=reason)
        return self._shown(result, trained.ref, plan, sum(bool(one.looks) for one in before))

    def _start(self, rung: RungName, plan: _Plan) -> str:
        if rung == "copy":
            return min((n for n in plan.losses if n != SCRATCH), key=lambda name: plan.losses[name])
        return plan.start()

    @staticmethod
    def _origin(manifest: Mapping[str, Any], start: str) -> str:
        return (manifest.get("port") or {}).get("start", start)

    def _train(self, rung: RungName, start: str, plan: _Plan, before: Sequence[RungResult]) -> TrainedAdapter:
        assert self.champion.base_model is not None
        if rung == "bare":
            return publish_prompted(self.inputs, self.store, self.home, start)  # type: ignore[arg-type]
        inputs = self.inputs
        if rung == "full":
            return self._train_in_full(inputs)
        if rung in ("copy", "tune", "distil"):
            policy = self.spec.migration
            warm = next((r.adapter_digest for r in before if r.rung == "tune" and r.adapter_digest), None)
            tuned = ArtifactRef("adapter", warm) if warm and rung == "distil" else None
            port = Port(
                rung,  # type: ignore[arg-type]
                "tune" if tuned else start,
                self.champion.adapter,
                self.champion.base_model,
                self._share(rung),
                policy.validation_share,
                tuned,
            )
            inputs = replace(inputs, port=port)
        return self._trained(inputs)

    def _train_in_full(self, inputs: AdapterInputs) -> TrainedAdapter:
        inputs, _ = resolve_kind(inputs, self.store, self.home, self.tell)
        try:
            return self._trained(inputs)
        except ValueError:  # the champion's kind of adapter may not work on this base
            if self.spec.adapter.kind != "auto" or inputs.spec.adapter.kind == "lora":
                raise
        return self._trained(_with_kind(inputs, "lora"))

    def _trained(self, inputs: AdapterInputs) -> TrainedAdapter:
        return train_adapter(
            inputs,
            self.store,
            self.home,
            on_progress=self.on_progress,
            checkpoint_seconds=self.checkpoint_seconds,
        )

    def _waste(
        self, rung: RungName, trained: TrainedAdapter, plan: _Plan, before: Sequence[RungResult]
    ) -> str | None:
        """Why the frozen rows need not be looked at."""
        seen = [loss for _, loss in trained.record.get("validation", [])]
        loss = min(seen) if seen else plan.losses[self._start(rung, plan)]
        # what it began with has had its look, or gets it now
        if seen and loss >= seen[0] and any(one.looks for one in before if one.rung in ("copy", "tune")):
            return f"no better than what it began with: {seen[0]:.3f} nats per validation answer"
        gained = plan.gained(loss)
        if gained is not None and gained < HOPELESS:
            return (
                f"{gained:.0%} of what the champion gains on validation answers ({loss:.3f} nats each), "
                f"{HOPELESS:.0%} is the least to be shown"
            )
        return self._hopeless(self._screened(trained.ref), plan.level)

    def _shown(self, result: RungResult, adapter: ArtifactRef, plan: _Plan, before: int) -> RungResult:
        """One look at the frozen rows, after `before` others. The first one also pays for the champion's
        answers."""
        since = self._began(f"{result.rung}-look")
        with self._timed():
            built = build_report(
                self.spec,
                self.root,
                self.store,
                self.home,
                adapter=adapter,
                dataset=self.dataset,
                base_model=self.base_model,
                champion=self.champion,
                looks=plan.looks,
                look=before + 1,
                since=since,
            )
        took = built.record["took"] if not built.reused or built.record.get("at", "") >= since else 0.0
        decision = built.decision
        difference = decision["difference"] or {}
        reasons = list(decision["reasons"])
        missing = self._rows_missing(decision, min(before + 2, plan.looks))
        if missing:
            reasons.append(
                f"no higher rung is tried: {missing} rows are needed for an even chance that an adapter as "
                "good as the champion is accepted"
            )
        return replace(
            result,
            verdict=decision["verdict"],
            reason="; ".join(reasons),
            report_digest=built.ref.digest,
            candidate=difference.get("candidate"),
            reference=difference.get("reference"),
            bare=_bare(built),
            negative_flips=difference.get("losses"),
            rows=difference.get("rows", 0),
            evaluation_seconds=result.evaluation_seconds + took + (0.0 if before else plan.level_seconds),
            looks=plan.looks,
            look=before + 1,
            rows_missing=missing,
        )

    def _rows_missing(self, decision: Mapping[str, Any], look: int) -> int:
        """Rows, where a rung that costs more would hardly help: the mean of this one is within the margin,
        the rows are too few to show it, and at the next look (`look`) an adapter that is as good as the
        champion, with as many flips, would be refused rather than accepted. 0 otherwise."""
        found = decision["difference"]
        if decision["verdict"] != "undecided" or not found or found["estimate"] < decision["threshold"]:
            return 0
        if look == decision["look"]:  # that was the last one
            return 0
        if found["lower"] > decision["threshold"]:  # it is something else that is in doubt
            return 0
        spec = share_alpha(self.spec.evaluation, decision["looks"], look)
        needs = rows_for_equal(Difference(**found), spec, EVEN)
        return needs if needs and needs > found["rows"] else 0

    def _shown_at_last(self, results: list[RungResult], plan: _Plan) -> list[RungResult]:
        """Where nothing was worth a look but an adapter must come out, the last one gets it."""
        if any(result.looks for result in results):
            return results
        for i in range(len(results) - 1, -1, -1):
            if digest := results[i].adapter_digest:
                known = _recall(self.store, self.key, "last")
                result = RungResult(**known) if known else None
                if result is None or not self._kept(result):
                    result = self._shown(results[i], ArtifactRef("adapter", digest), plan, before=0)
                    _remember(self.store, self.key, "last", dataclasses.asdict(result))
                return [*results[:i], result, *results[i + 1 :]]
        raise NotCarried(
            f"{self.spec.name}: no rung gave an adapter for {self.inputs.base_manifest['revision']}: "
            + "; ".join(f"{result.rung}: {result.reason}" for result in results)
        )

    def _chosen(self, results: Sequence[RungResult]) -> TrainedAdapter:
        shown = [result for result in results if result.candidate is not None or result.report_digest]
        accepted = next((result for result in shown if result.verdict == "promote"), None)
        best = accepted or max(shown, key=lambda result: result.candidate or 0.0)
        assert best.adapter_digest is not None
        return self._published(ArtifactRef(ADAPTER, best.adapter_digest))

    def _published(self, ref: ArtifactRef) -> TrainedAdapter:
        """An adapter with its record. Raises ArtifactError when either is damaged or gone."""
        manifest = read_json(self.store.open(ref) / "manifest.json")
        known = self.store.recall(ADAPTER, manifest["input_key"])
        if known is None:
            raise ArtifactError(f"{ref}: its record is gone")
        return TrainedAdapter(ref, known[1], reused=True)

    # -- what it costs ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _timed(self, since: str | None = None) -> Iterator[Callable[[], float]]:
        """Count the seconds of the block as spent; the callable gives them, also afterwards. With what the
        answers took that it found kept `since`: by a process that was killed."""
        started, ended = time.monotonic(), None
        kept: list[Answer] = []
        self.kept = kept

        def seconds() -> float:
            earlier = 0.0 if since is None else seconds_since(kept, since)
            return round((ended or time.monotonic()) - started + earlier, 3)

        try:
            yield seconds
        finally:
            ended = time.monotonic()
            self.spent += ended - started

    def _took(self, trained: TrainedAdapter, seconds: float) -> float:
        """What an adapter took of this climb, in processes that were killed as well; `seconds`: in this."""
        record = trained.record
        earlier = record.get("earlier_seconds", 0.0)
        if not trained.reused:
            return seconds + earlier
        return record["seconds"] + earlier if record["trained_at"] >= self.began else 0.0

    def _full(self, results: Sequence[RungResult]) -> tuple[float | None, str]:
        """What a full training and its evaluation take: measured, or predicted; and what from. The first look
        pays for the arms that every report has; what only the ladder asks is not part of it."""
        looks = [result for result in results if result.looks]
        seconds = [look.evaluation_seconds - look.screen_seconds for look in looks]
        evaluation = seconds[0] if looks else 0.0
        same = self._base_rows() == self._frozen_rows()
        if same and looks and looks[0].rung == "bare":  # its own answers are those of a base arm
            evaluation += seconds[1] if len(looks) > 1 else evaluation / 2
        full = next((result for result in results if result.rung == "full" and result.adapter_digest), None)
        if full is not None and full.training_seconds:
            return full.training_seconds + evaluation, "measured"
        training, where = self._predicted_full()
        return (None, "") if training is None else (training + evaluation, where)

    def _predicted_full(self) -> tuple[float | None, str]:
        """Seconds of a full training here: its tokens, at the rate of the champion's training, by the sizes
        of the two bases."""
        from ml_assets.engine.training import plan_batches

        digest, manifest = self.champion.adapter.digest, self.parent
        rate = None
        for _ in range(20):  # one that was only copied has no rate of its own
            known = self.store.recall(ADAPTER, manifest["input_key"])
            rate = known[1].get("tokens_per_second") if known else None
            if rate or not manifest.get("parent"):
                break
            digest = manifest["parent"]
            try:
                manifest = read_json(self.store.open(ArtifactRef("adapter", digest)) / "manifest.json")
            except ArtifactError:
                break
        if not rate:
            return None, ""
        lengths = self._lengths()
        batches = plan_batches(lengths, self.inputs.spec.adapter)
        tokens = sum(lengths[i] for batch in batches for i in batch)
        assert self.champion.base_model is not None
        sizes = [_weight_bytes(self.store.open(ref)) for ref in (self.base_model, self.champion.base_model)]
        seconds = tokens / rate * sizes[0] / max(1, sizes[1])
        return seconds, f"{rate:.0f} tokens/s of adapter {digest[:12]} on {manifest['base_revision']}"

    def _lengths(self) -> list[int]:
        from ml_assets.engine.loading import load_reader

        base = load_reader(self.inputs.base_directory)
        examples = training_examples(
            base, self.spec.prompt, load_rows(self.inputs.dataset_directory, "train")
        )
        return [len(example) for example in examples]

    # -- validation rows -------------------------------------------------------------------------------

    @property
    def _metric(self) -> str:
        return metric_name(self.spec.evaluation.resolved_metrics()[0])

    def _screened(self, adapter: ArtifactRef) -> list[float]:
        """The deciding metric of an adapter's answers to some validation rows."""
        from ml_assets.engine import hardware
        from ml_assets.engine.loading import load_base
        from ml_assets.eval_reports.runner import evaluate

        folder = self.store.open(adapter)
        rows = self.held[: self._screen_rows()]
        if not rows:
            return []
        with hardware.computing(self.home):
            base = load_base(self.inputs.base_directory, hardware.compute_dtype(self.home))
            base.attach("adapter", folder)
            lines, _ = evaluate(
                base,
                self.spec.prompt,
                self.spec.evaluation,
                rows,
                load_rows(self.inputs.dataset_directory, "train"),
                [adapter_arm("adapter", adapter, folder)],
                store=self.store,
                compute=hardware.hardware_class(self.home),
                kept_before=self.kept,
            )
        return [line["scores"][self._metric] for line in lines]

    def _hopeless(self, scores: Sequence[float], level: float) -> str | None:
        """Why answers with these scores, on validation rows, show that an adapter is below the champion."""
        if not scores:
            return None
        upper = mean_bounds(scores, 0, 1, alpha=SCREEN_ALPHA)[1]
        bar = level - self.spec.evaluation.gate.margin
        if upper >= bar:
            return None
        return (
            f"{self._metric} {_mean(scores):.3f} on {len(scores)} validation rows, at most {upper:.3f}; the "
            f"champion has {level:.3f}"
        )


def _with_kind(inputs: AdapterInputs, kind: str) -> AdapterInputs:
    recipe = AdapterRecipe(**{**inputs.spec.adapter.model_dump(), "kind": kind})
    return replace(inputs, spec=inputs.spec.model_copy(update={"adapter": recipe}))


def _bare(built: BuiltReport) -> float | None:
    arms, metric = built.summary["arms"], built.summary["metric"]
    found = [arms[name]["metrics"][metric] for name in ("zero_shot", "few_shot") if name in arms]
    return max((entry["mean"] for entry in found if entry), default=None)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _weight_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))
