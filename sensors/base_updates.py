"""Notices new revisions of the base models that customizations follow, and carries these over."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path

import dagster as dg
from dagster._core.storage.tags import RUN_KEY_TAG

from ml_assets.artifacts import canonical_json, sha256_bytes
from ml_assets.base_models.identity import BaseModelError
from ml_assets.base_models.partitions import BASE_MODELS
from ml_assets.base_models.register import current_revision
from ml_assets.base_models.sources import SourceChanging
from ml_assets.cli.runs import failure_of
from ml_assets.decisions.asset import asset_url
from ml_assets.decisions.book import DecisionBook
from ml_assets.decisions.diagnosis import Policies
from ml_assets.decisions.records import Alert, Note
from ml_assets.settings import Settings
from ml_assets.spec import BaseFamily, CustomizationSpec
from resources.artifact_store import ArtifactStoreResource
from resources.base_model_hub import BaseModelHub
from resources.ledger import LedgerResource
from resources.traffic_log import TrafficLogResource
from sensors.dispatch import NOT_STARTED, settled, shorten
from sensors.migration import (
    BASE,
    PLAN,
    SENSOR,
    Fleet,
    Stands,
    carry_out,
    make_plan,
    newest_materialization,
    probe_of,
    unusable,
)

PATIENCE = 20.0  # seconds that a tick waits; Dagster gives up on a tick after 60


def build_base_updates_sensor(
    families: Sequence[BaseFamily],
    root: Path,
    specs: Sequence[CustomizationSpec] = (),
    patience: float = PATIENCE,
    interval: int = 60,
    **limits: object,
) -> dg.SensorDefinition:
    """A sensor that adds a partition when the source of a family holds new content, has it materialized and
    probed, plans the migration of the customizations that follow it, and starts it as one backfill.

    It looks at sizes, times and commits first, and hashes content only when those changed. A source that
    takes longer than `patience` seconds to download and hash goes on in a thread, and the next tick looks
    again. One that fails does not hold up the others, and neither does a revision that fails its probe. What
    a tick does follows from the sources, the instance and the book: the cursor only saves asking again for
    the page of the plan.
    """
    lookups: dict[str, Future[str]] = {}
    by_name, policies = {spec.name: spec for spec in specs}, Policies(specs)
    followed = {family for spec in specs for family in spec.base_models}
    targets = [BASE, *([PLAN] if specs else [])]

    @dg.sensor(
        name=SENSOR,
        asset_selection=dg.AssetSelection.assets(*targets),
        minimum_interval_seconds=interval,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Adds a partition for each new revision of a followed base model, has it probed, and "
        "starts one backfill over the adapters and eval reports of the customizations that follow it, within "
        "the budget: " + ", ".join(family.name for family in families),
    )
    def base_updates(
        context: dg.SensorEvaluationContext,
        base_model_hub: BaseModelHub,
        ledger: LedgerResource,
        artifact_store: ArtifactStoreResource,
        traffic_log: TrafficLogResource,
    ) -> dg.SensorResult | dg.SkipReason:
        for family in families:
            if family.name not in lookups:
                arguments = (family, root, base_model_hub.settings(), base_model_hub.access())
                lookups[family.name] = _start(current_revision, *arguments)
        wait(lookups.values(), timeout=patience)
        existing = context.instance.get_dynamic_partitions(str(BASE_MODELS.name))
        current: dict[str, str] = {}
        new, unchanged, failed, changing = [], [], [], []
        for name in [name for name, lookup in lookups.items() if lookup.done()]:
            lookup = lookups.pop(name)
            error = lookup.exception()
            if isinstance(error, SourceChanging):
                changing.append(f"{name}: {error}")
            elif error is not None:
                failed.append(f"{name}: {error}")
            else:
                current[name] = lookup.result()
                (unchanged if lookup.result() in existing else new).append(lookup.result())
        lines = [f"new base revisions: {', '.join(new)}"] if new else []
        requests: list[dg.RunRequest] = []
        cursor = context.cursor
        if specs:
            with ledger.opened() as opened, traffic_log.opened() as log:
                fleet = Fleet(
                    instance=context.instance,
                    book=DecisionBook(opened),
                    ledger=opened,
                    specs=by_name,
                    policies=policies,
                    serving=opened.current_all(),
                    settings=Settings.from_env(),
                    **limits,  # type: ignore[arg-type]
                )
                assert context.repository_def is not None
                graph = context.repository_def.asset_graph
                store = artifact_store.store()
                current |= _remember(fleet, current, existing, [family.name for family in families])
                notes, known = fleet.book.notes(), {*existing, *new}
                under_way = [one.decision for one in fleet.book.open() if one.decision.action == "migrate"]
                wanted = {str(decision.base_revision) for decision in under_way} & known
                probed = {
                    revision: _bring_up(fleet, revision, notes.get(_held(revision), {}).get("held"))
                    for revision in sorted(wanted | set(current.values()))
                    if revision.rpartition("@")[0] in followed
                }
                stands: dict[str, Stands] = {revision: one for revision, (one, _, _) in probed.items()}
                lines += carry_out(fleet, graph, current, stands, known)
                for revision, (_, request, line) in probed.items():
                    requests += [request] if request else []
                    if line is None and revision in current.values():
                        line = make_plan(fleet, revision, store, log)
                    lines += [line] if line else []
                page = _page_state(fleet)
            if page not in (None, cursor):
                requests.append(dg.RunRequest(f"plan:{page}", asset_selection=[PLAN]))
                cursor = page
        if failed and not (new or requests or lines):
            raise BaseModelError("; ".join(failed))
        for problem in failed:
            context.log.error(problem)
        lines += [f"unchanged: {', '.join(unchanged)}"] if unchanged and not lines else []
        lines += changing
        lines += [f"still being downloaded or hashed: {', '.join(lookups)}"] if lookups else []
        text = shorten("; ".join(lines) or "no base model is declared")
        if requests:
            context.log.info(text)
        return dg.SensorResult(
            run_requests=requests,
            # without a run, Dagster shows the tick as skipped
            skip_reason=None if requests else text,
            dynamic_partitions_requests=[BASE_MODELS.build_add_request(new)] if new else [],
            cursor=cursor,
        )

    return base_updates


def _remember(
    fleet: Fleet, current: Mapping[str, str], existing: Sequence[str], families: Sequence[str]
) -> dict[str, str]:
    """Write down what the sources hold, and give back what those that could not be read held last. The order
    of the partitions does not say that: a publisher may go back to an earlier revision."""
    notes = fleet.book.notes()
    last = {name: notes.get(f"base:{name}", {}).get("current") for name in families}
    held = {name: str(note.value["revision"]) for name, note in last.items() if note is not None}
    for name, revision in current.items():
        note = notes.get(_held(revision), {}).get("held")
        before: float = note.value["after"] if note else 0.0
        old = None if revision in existing else newest_materialization(fleet.instance, revision)
        after = max(before, old.timestamp) if old else before
        # what an earlier run could not make may be made now, and what was made for a partition that is
        # deleted is gone; written first, so that a tick that dies in between does it again
        if held.get(name, revision) != revision or after > before:
            fleet.book.note(_held(revision), "held", {"after": after})
        if held.get(name) != revision:
            fleet.book.note(f"base:{name}", "current", {"revision": revision})
    return {name: held[name] for name in held if name not in current and held[name] in existing}


def _held(revision: str) -> str:
    return f"base_revision:{revision}"


def _bring_up(
    fleet: Fleet, revision: str, held: Note | None
) -> tuple[Stands, dg.RunRequest | None, str | None]:
    """Have a base revision made and probed: (how it stands, the run that does so, what it waits for). One
    that can't be used stays as it is, until its source holds it again or a person materializes it. `held`:
    since when the source holds it, when it was not the first one of its family."""
    instance = fleet.instance
    probe = probe_of(instance, revision, held.value["after"] if held else 0.0)
    if probe is None:
        key = f"{revision}:{held.at}" if held else revision
        records = instance.get_run_records(dg.RunsFilter(tags={RUN_KEY_TAG: key}))
        # none, or the daemon died before the run was submitted: under the same key Dagster goes on with it
        if all(record.dagster_run.status == NOT_STARTED for record in records):
            request = dg.RunRequest(key, asset_selection=[BASE], partition_key=revision)
            return "untried", request, f"{revision} is materialized and probed"
        ended = settled(instance, records)
        if ended is None:
            return "untried", None, f"{revision} is being materialized and probed"
        return "unusable", None, _stopped(fleet, revision, ended.dagster_run.run_id, None)
    if not probe.complete:
        return "untried", None, f"{revision} is being probed"
    if reason := unusable(fleet, revision, probe):
        return "unusable", None, _stopped(fleet, revision, probe.run_id, reason)
    return "usable", None, None


def _stopped(fleet: Fleet, revision: str, run_id: str, reason: str | None) -> str:
    if reason is None:
        kinds = {dg.DagsterEventType.STEP_FAILURE, dg.DagsterEventType.RUN_FAILURE}
        reasons = [failure_of(entry) for entry in fleet.instance.all_logs(run_id, of_type=kinds)]
        reason = next((one for one in reasons if one), "it was not made and probed to the end")
    fleet.book.alert(
        Alert(
            id=f"base_revision:{revision}:{run_id}",
            title=f"base revision {revision} can't be used",
            text=f"Nothing is migrated to it. {reason}"[:2000],
            severity="error",
            url=asset_url(fleet.settings.dagster_url, *BASE.path),
        )
    )
    return f"{revision} stops at its probe: {shorten(reason, 300)}"


def _page_state(fleet: Fleet) -> str | None:
    """Changes when the page of the plan is to be made again: for new decisions, and once those under way have
    ended, for what became of them and what serves. None before the first plan."""
    histories = fleet.book.migrations()
    if not histories:
        return None
    if any(history.claimed and history.is_open for history in histories):
        return sha256_bytes(canonical_json(sorted(history.decision.id for history in histories)))[:16]
    states = sorted([history.decision.id, history.state] for history in histories)
    # a release of its own, also where an earlier adapter serves again: a run key is used once
    serving = sorted([name, release.id] for name, release in fleet.serving.items())
    return sha256_bytes(canonical_json([states, serving]))[:16]


def _start(function: Callable[..., str], *arguments: object) -> Future[str]:
    """Call in a daemon thread, so that a code server can stop in the middle of a download; the next one goes
    on from there."""
    future: Future[str] = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, name="base-updates", daemon=True).start()
    return future
