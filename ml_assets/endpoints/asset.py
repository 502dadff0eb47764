"""`<name>/endpoint`: the version of one customization that answers users."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import dagster as dg
import pydantic

from ml_assets.artifacts import ArtifactError, ArtifactRef, ArtifactStore
from ml_assets.code_link import code_link
from ml_assets.decisions.staleness import waits_for_a_person
from ml_assets.endpoints.checks import check_specs, curl, not_serving, serving
from ml_assets.endpoints.gateway.client import GatewayError
from ml_assets.endpoints.ledger import Fenced, Ledger, Release
from ml_assets.endpoints.release import (
    ReleaseFailed,
    follow_ledger,
    read_fingerprint,
    release,
    serve_again,
    verify_served,
    withdraw,
)
from ml_assets.spec import CustomizationSpec
from resources.artifact_store import ArtifactRefIOManager, ArtifactStoreResource
from resources.gateway import GatewayResource
from resources.ledger import LedgerResource
from resources.mlflow_tracking import MlflowTracking, VersionInfo

CHAMPION, CHALLENGER = "champion", "challenger"
AUTOMATIC = ("dagster/sensor_name", "dagster/schedule_name", "dagster/auto_materialize")
"""Tags of runs that no person launched."""
HISTORY_ROWS = 20
RECORDED = ("engine", "max_new_tokens", "max_prompt_tokens")
"""Fields of the `endpoint` block that a release records and the gateway follows."""
FEWEST_CHARACTERS = 6
"""Of a digest, to name what it is the digest of."""


class EndpointConfig(dg.Config):
    """What a person may ask for in the launchpad; with neither, the newest accepted version serves."""

    serve: str = pydantic.Field(
        default="",
        description=(
            "serve again what served before, without a training or an evaluation: the number of a release in "
            f"the endpoint's history, or the first characters (at least {FEWEST_CHARACTERS}) of its adapter"
        ),
    )
    withdraw: bool = pydantic.Field(default=False, description="let nothing serve from now on")


def build_endpoint_asset(spec: CustomizationSpec) -> dg.AssetsDefinition:
    """The endpoint asset of one customization: releases the challenger if there is one, and proves in any
    case that the gateway answers with the accepted version."""
    key = dg.AssetKey([spec.name, "endpoint"])
    settings: dict[str, Any] = {name: getattr(spec.endpoint, name) for name in RECORDED}
    settings["traffic_policy"] = {"redact": spec.dataset.redact, "retention": spec.traffic.retention}
    fresh = spec.freshness.endpoint

    @dg.asset(
        key=key,
        ins={"eval_reports": dg.AssetIn(key=dg.AssetKey([spec.name, "eval_report"]))},
        description=(
            f"Serves **{spec.name}** at the gateway (`model={spec.name}`). A version that the evaluation "
            "promoted is loaded beside the one that serves, and takes over once it answers with its own "
            "fingerprint; otherwise the one before goes on."
        ),
        group_name=spec.name,
        owners=spec.owners,
        kinds={"fastapi", "openai"},
        tags={"customization": spec.name},
        metadata=code_link(),
        freshness_policy=dg.FreshnessPolicy.time_window(fail_window=_duration(fresh)) if fresh else None,
        check_specs=check_specs(key),
    )
    def endpoint(
        context: dg.AssetExecutionContext,
        config: EndpointConfig,
        artifact_store: ArtifactStoreResource,
        io_manager: dg.ResourceParam[ArtifactRefIOManager],
        mlflow_tracking: MlflowTracking,
        ledger: LedgerResource,
        gateway: GatewayResource,
        eval_reports: dict[str, ArtifactRef],
    ) -> Iterator[dg.AssetCheckResult | dg.MaterializeResult]:
        store = artifact_store.store()

        def move_alias(version: str | None) -> None:
            if version is None:
                mlflow_tracking.delete_alias(spec.name, CHAMPION)
            else:
                mlflow_tracking.set_alias(spec.name, CHAMPION, version)

        def still_wanted() -> None:
            run = context.instance.get_run_by_id(context.run.run_id)
            if run is not None and run.is_finished:
                raise Fenced(f"run {context.run.run_id} was ended meanwhile ({run.status.value})")

        with ledger.opened() as book:

            def released(candidate: Release) -> Release:
                return release(
                    candidate,
                    expected=current,
                    ledger=book,
                    store=store,
                    gateway=client,
                    move_alias=move_alias,
                    still_wanted=still_wanted,
                )

            try:
                with gateway.client() as client:
                    champion = mlflow_tracking.get_alias(spec.name, CHAMPION)
                    current = follow_ledger(
                        spec.name, champion and champion.version, context.run.run_id, book, move_alias
                    )
                    by_hand: dict[str, Any] = {"run_id": context.run.run_id, "actor": actor(context.run.tags)}
                    if config.withdraw or config.serve:
                        chosen = chosen_release(spec.name, config, book, current)
                        if config.withdraw:
                            gone = withdraw(
                                dataclasses.replace(chosen, **by_hand, reason="withdrawn by hand"),
                                ledger=book,
                                gateway=client,
                                move_alias=move_alias,
                            )
                            mlflow_tracking.delete_alias(spec.name, CHALLENGER)
                            yield _withdrawn(key, gone, book)
                            return
                        if current is None or chosen.adapter_digest != current.adapter_digest:
                            reason = f"by hand: what release {chosen.id} served"
                            current = released(
                                dataclasses.replace(
                                    chosen, **settings, **by_hand, action="rollback", reason=reason
                                )
                            )
                        # what a person turned away from does not come back by itself
                        mlflow_tracking.delete_alias(spec.name, CHALLENGER)
                    challenger = mlflow_tracking.get_alias(spec.name, CHALLENGER)
                    if challenger and not may_move(spec, challenger, current, context.run.tags):
                        revision = challenger.tags["base_revision"]
                        context.log.info(
                            f"version {challenger.version} on {revision} was accepted and waits for a person "
                            "who materializes this asset (migration.move is manual)"
                        )
                        challenger = None
                    if challenger and (not current or challenger.adapter_digest != current.adapter_digest):
                        report = accepted_report(store, spec.name, challenger, current)
                        revision = challenger.tags["base_revision"]
                        base = io_manager.load(dg.AssetKey("base_model"), revision)
                        candidate = Release(
                            customization=spec.name,
                            base_revision=revision,
                            base_digest=base.digest,
                            adapter_digest=challenger.adapter_digest,
                            report_digest=report,
                            mlflow_version=challenger.version,
                            **settings,
                            **by_hand,
                            reason=f"promoted by eval report {report[:12]}",
                        )
                        context.log.info(
                            f"releasing version {challenger.version}: {candidate.adapter_digest}"
                        )
                        current = released(candidate)
                    elif current is None:
                        reason = withdrawn_by_hand(spec.name, book) or nothing_accepted(store, eval_reports)
                        raise dg.Failure(reason, allow_retries=False)
                    elif current != (same := dataclasses.replace(current, **settings)):
                        candidate = dataclasses.replace(
                            same,
                            action="release",
                            **by_hand,
                            reason="the endpoint's engine, its limits or its traffic policy changed",
                        )
                        context.log.info(f"serving {current.adapter_digest} with {settings}")
                        current = released(candidate)
                    elif serve_again(current, store=store, gateway=client):
                        context.log.warning(f"the gateway follows the ledger again: {current.adapter_digest}")
                    fingerprint = read_fingerprint(store, current.adapter_digest)
                    probed = verify_served(current, fingerprint, client)
            except (GatewayError, ReleaseFailed, ArtifactError, Fenced) as error:
                yield not_serving(key, str(error))
                cause = error.__cause__ if isinstance(error, ReleaseFailed) else error
                away = isinstance(cause, GatewayError) and cause.code == "unreachable"
                raise dg.Failure(str(error), allow_retries=away) from error
            yield dg.MaterializeResult(
                data_version=dg.DataVersion(current.adapter_digest),
                metadata={
                    **_metadata(current, book, gateway.url, fingerprint),
                    **_links(mlflow_tracking, current),
                },
                check_results=[serving(key, current, fingerprint, probed)],
            )

    return endpoint


def chosen_release(
    customization: str, config: EndpointConfig, ledger: Ledger, current: Release | None
) -> Release:
    """The release that a person names to serve again, or the one to withdraw. Raises ReleaseFailed that says
    what could be named."""
    if config.withdraw:
        if config.serve:
            raise ReleaseFailed(
                f"serve is {config.serve!r} and withdraw is true: expected one of them; nothing changed"
            )
        if current is None:
            raise ReleaseFailed(f"nothing serves {customization}: there is nothing to withdraw")
        return current
    named = config.serve.strip().lower()
    served = [row for row in ledger.history(customization) if row.action != "withdraw"]
    for row in served:
        by_digest = len(named) >= FEWEST_CHARACTERS and row.adapter_digest.startswith(named)
        if named == str(row.id) or by_digest:
            return row
    known = ", ".join(f"{row.id} (adapter {row.adapter_digest[:12]})" for row in served[:HISTORY_ROWS])
    raise ReleaseFailed(
        f"serve is {config.serve!r}: expected the number of a release of {customization} or at least "
        f"{FEWEST_CHARACTERS} characters of its adapter; it has {known or 'no release'}; nothing changed"
    )


def withdrawn_by_hand(customization: str, ledger: Ledger) -> str | None:
    """That somebody let nothing serve, and how it serves again; None when that is not why nothing does."""
    newest = next(iter(ledger.history(customization, 1)), None)
    if newest is None or newest.action != "withdraw":
        return None
    return (
        f"nothing to serve: adapter {newest.adapter_digest[:12]} was withdrawn at {newest.at[:16]} by "
        f"{newest.actor} ({newest.reason}), and nothing was accepted since. To serve it again, materialize "
        f"this asset with the config `serve: {newest.adapter_digest[:12]}`"
    )


def may_move(
    spec: CustomizationSpec, challenger: VersionInfo, current: Release | None, tags: Mapping[str, str]
) -> bool:
    """Whether this run may move the endpoint to the challenger's base revision: with `migration.move: manual`
    only one that a person launched."""
    if not waits_for_a_person(spec, challenger.tags["base_revision"], current):
        return True
    return not any(tag in tags for tag in AUTOMATIC)


def accepted_report(
    store: ArtifactStore, customization: str, challenger: VersionInfo, current: Release | None
) -> str:
    """Digest of the eval report that promoted the challenger.

    Raises ReleaseFailed when there is none, when it is about another adapter, does not promote, or compared
    with something else than what serves now.
    """
    name = f"challenger {customization} version {challenger.version}"
    digest = challenger.tags.get("report_digest")
    if not digest:
        raise ReleaseFailed(f"{name} has no eval report: materialize {customization}/eval_report")
    decision, about = _report(store, digest)
    if about.get("candidate") != challenger.adapter_digest:
        candidate = str(about.get("candidate"))[:12]
        raise ReleaseFailed(f"{name}: its report {digest[:12]} is about adapter {candidate}")
    if decision["verdict"] != "promote":
        reasons = " ".join(decision["reasons"])
        raise ReleaseFailed(f"{name}: its report {digest[:12]} says {decision['verdict']}: {reasons}")
    serves = current.adapter_digest if current else None
    if about.get("champion") != serves:
        raise ReleaseFailed(
            f"{name}: its report {digest[:12]} compared it with {_adapter(about.get('champion'))}, but "
            f"{_adapter(serves)} serves: materialize {customization}/eval_report again"
        )
    return digest


def _adapter(digest: str | None) -> str:
    return f"adapter {digest[:12]}" if digest else "the bare base"


def nothing_accepted(store: ArtifactStore, eval_reports: Mapping[str, ArtifactRef]) -> str:
    """Why nothing can be served: the gate's reasons for every base revision."""
    if not eval_reports:
        return "nothing to serve: no eval report was materialized yet"
    lines = []
    for revision, ref in sorted(eval_reports.items()):
        decision, _ = _report(store, ref.digest)
        lines.append(f"{revision}: {decision['verdict']}. {' '.join(decision['reasons'])}")
    return "nothing to serve: no version was accepted yet\n" + "\n".join(lines)


def actor(tags: Mapping[str, str]) -> str:
    """Who or what started a run, from its tags."""
    for tag in ("user", "dagster/schedule_name", "dagster/sensor_name", "dagster/backfill"):
        if tag in tags:
            return f"{tag.removeprefix('dagster/').removesuffix('_name')} {tags[tag]}"
    return "dagster"


def _report(store: ArtifactStore, digest: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(decision, what the report is about)."""
    directory = store.open(ArtifactRef("eval_report", digest))
    summary = json.loads((directory / "summary.json").read_bytes())
    return json.loads((directory / "decision.json").read_bytes()), summary["about"]


def _metadata(
    current: Release, ledger: Ledger, url: str, fingerprint: Mapping[str, Any]
) -> dict[str, dg.MetadataValue]:
    return {
        "version": dg.MetadataValue.text(current.mlflow_version),
        "adapter": dg.MetadataValue.text(current.adapter_digest),
        "base_revision": dg.MetadataValue.text(current.base_revision),
        "eval_report": dg.MetadataValue.text(current.report_digest),
        "served_since": dg.MetadataValue.text(current.at),
        "url": dg.MetadataValue.url(f"{url}/v1"),
        "try_it": dg.MetadataValue.md(
            "```sh\nexport EVERGREEN_API_KEY=...   # evergreen keys create\n"
            f"{curl(url, current.customization, fingerprint)}\n```"
        ),
        "history": _history(current.customization, ledger),
    }


def _withdrawn(key: dg.AssetKey, gone: Release, ledger: Ledger) -> dg.MaterializeResult:
    reason = f"Nothing serves: adapter {gone.adapter_digest[:12]} was withdrawn by {gone.actor}."
    return dg.MaterializeResult(
        data_version=dg.DataVersion(f"withdrawn-{gone.id}"),
        metadata={"history": _history(gone.customization, ledger)},
        check_results=[not_serving(key, reason)],
    )


def _history(customization: str, ledger: Ledger) -> dg.TableMetadataValue:
    records = [
        dg.TableRecord(
            {
                "release": row.id,
                "at": row.at[:19].replace("T", " "),
                "action": row.action,
                "version": row.mlflow_version,
                "adapter": row.adapter_digest[:12],
                "base": row.base_revision,
                "actor": row.actor,
                "reason": row.reason,
                "run": row.run_id[:8],
            }
        )
        for row in ledger.history(customization, HISTORY_ROWS)
    ]
    return dg.MetadataValue.table(records)


def _links(tracking: MlflowTracking, current: Release) -> dict[str, dg.MetadataValue]:
    version = tracking.find_version(current.customization, current.adapter_digest)
    if version is None:
        return {}
    links: dict[str, dg.MetadataValue] = {
        "mlflow_version": dg.MetadataValue.url(tracking.version_url(version))
    }
    with contextlib.suppress(Exception):  # a run deleted in MLflow is no reason not to serve
        links["mlflow_run"] = dg.MetadataValue.url(tracking.run_url(version.run_id))
    return links


def _duration(text: str) -> timedelta:
    unit = {"m": "minutes", "h": "hours", "d": "days"}[text[-1]]
    return timedelta(**{unit: int(text[:-1])})
