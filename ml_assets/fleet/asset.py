"""`fleet/overview`, `fleet/cost_ledger` and `fleet/migration_plan`: all customizations in one table each."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dagster as dg

from ml_assets.artifacts import ArtifactError, ArtifactStore, canonical_json, read_json
from ml_assets.base_models.partitions import BASE_MODELS
from ml_assets.decisions.book import DecisionBook, History
from ml_assets.decisions.diagnosis import Policy
from ml_assets.decisions.records import NOTHING, Note, Spent
from ml_assets.drift_reports.fleet import fleet_alarms
from ml_assets.endpoints.ledger import Release, now
from ml_assets.fleet.migration_page import (
    Evaluated,
    build_page,
    median_latencies,
    render_html,
    table_rows,
)
from ml_assets.settings import Settings
from ml_assets.spec import CustomizationSpec
from resources.artifact_store import ARTIFACT_REF, ArtifactRefIOManager, ArtifactStoreResource
from resources.ledger import LedgerResource
from resources.traffic_log import TrafficLogResource

TIMED_REQUESTS = 200
"""The newest requests of a customization, whose latency the plan shows."""


def build_fleet_assets(specs: Sequence[CustomizationSpec]) -> list[dg.AssetsDefinition]:
    """The assets. They read ledger and book: a few queries, however many customizations there are."""

    @dg.asset(
        key=dg.AssetKey(["fleet", "overview"]),
        group_name="fleet",
        kinds={"report"},
        description="What serves, since when, what the last look found, what was decided, what was spent: "
        "one row for each customization.",
    )
    def overview(ledger: LedgerResource) -> dg.MaterializeResult:
        settings, month = Settings.from_env(), now()[:7]
        with ledger.opened() as opened:
            book = DecisionBook(opened)
            serving, notes, latest = opened.current_all(), book.notes(), book.latest_all()
            costs, under_way = book.costs_of_month(month), book.claims()
        rows = [
            overview_row(
                spec,
                Policy.of(spec, settings),
                serving.get(spec.name),
                notes.get(spec.name, {}),
                latest.get(spec.name),
                total(costs.get(spec.name, {})),
            )
            for spec in specs
        ]
        losing = [row["customization"] for row in rows if row["last look"] in ("loss", "unknown_loss")]
        looks = {name: found["look"].value for name, found in notes.items() if "look" in found}
        moved = fleet_alarms({name: float(look.get("e_value", 1.0)) for name, look in looks.items()})
        return dg.MaterializeResult(
            metadata={
                "customizations": table(rows),
                "serving": sum(row["champion"] != "" for row in rows),
                "with_confirmed_loss": len(losing),
                "traffic_has_moved": ", ".join(moved) or "none stands out",
                "actions_under_way": len(under_way),
            }
        )

    @dg.asset(
        key=dg.AssetKey(["fleet", "cost_ledger"]),
        group_name="fleet",
        kinds={"report"},
        description="What training and evaluation cost this month (UTC), by customization, and the budgets.",
    )
    def cost_ledger(ledger: LedgerResource) -> dg.MaterializeResult:
        settings, month = Settings.from_env(), now()[:7]
        with ledger.decisions() as book:
            costs = book.costs_of_month(month)
            reserved = book.reserved(None, settings.device_second_price)
        rows: list[dict[str, str | float]] = [
            {
                "customization": name,
                "kind": kind,
                "device seconds": round(spent.device_seconds, 1),
                "money": round(spent.money, 4),
            }
            for name, kinds in sorted(costs.items())
            for kind, spent in sorted(kinds.items())
        ]
        whole = sum((total(kinds) for kinds in costs.values()), NOTHING)
        metadata: dict[str, Any] = {
            "month": month,
            "device_seconds": round(whole.device_seconds, 1),
            "money": round(whole.money, 4),
            "reserved_device_seconds": round(reserved.device_seconds, 1),
            "costs": table(rows) if rows else "nothing was computed yet",
        }
        if settings.fleet_device_seconds is not None:
            metadata["budget_device_seconds"] = settings.fleet_device_seconds
        if settings.fleet_money is not None:
            metadata["budget_money"] = settings.fleet_money
        return dg.MaterializeResult(metadata=metadata)

    @dg.asset(
        key=dg.AssetKey(["fleet", "migration_plan"]),
        dagster_type=ARTIFACT_REF,
        group_name="fleet",
        kinds={"report"},
        description="All customizations on all base revisions that they follow: quality, value, latency, "
        "cost to serve, cost to move, the gate's verdict and what to do: `move`, `stay` or `undecided`.",
    )
    def migration_plan(
        context: dg.AssetExecutionContext,
        artifact_store: ArtifactStoreResource,
        io_manager: dg.ResourceParam[ArtifactRefIOManager],
        ledger: LedgerResource,
        traffic_log: TrafficLogResource,
    ) -> dg.MaterializeResult:
        store, at = artifact_store.store(), now()
        revisions = context.instance.get_dynamic_partitions(str(BASE_MODELS.name))
        with ledger.opened() as opened, traffic_log.opened() as log:
            book = DecisionBook(opened)
            histories, climbs = book.migrations(), book.climbs()
            page = build_page(
                specs,
                revisions,
                report_reader(store, io_manager),
                histories,
                climbs,
                book.spent_on([history.decision.id for history in histories]),
                opened.history,
                lambda name: median_latencies(log.newest(name, TIMED_REQUESTS)),
                at,
            )
        files = {"page.html": render_html(page, at).encode(), "page.json": canonical_json(page.as_json())}
        ref = store.publish("migration_plan", files)
        metadata: dict[str, Any] = {
            "page": dg.MetadataValue.path(f"{store.location(ref)}/page.html"),
            "customizations": table(table_rows(page)) if page.lines else "no base revision is known yet",
            "predicted_device_seconds": page.predicted_seconds,
            **({"plan": table(page.plan)} if page.plan else {}),
            **({} if page.saved is None else {"saved": page.saved}),
        }
        counts = Counter(line.recommendation.partition(":")[0] for line in page.lines)
        metadata |= {f"{name.replace(' ', '_')}": count for name, count in sorted(counts.items())}
        return dg.MaterializeResult(value=ref, data_version=dg.DataVersion(ref.digest), metadata=metadata)

    return [overview, cost_ledger, migration_plan]


def report_reader(
    store: ArtifactStore, references: ArtifactRefIOManager
) -> Callable[[str, str], Evaluated | None]:
    """Finds the newest eval report of a customization on a base revision. One that is gone or damaged is
    none."""
    records = {memo.ref.digest: memo.record for memo in store.memos("eval_report")}

    def read(customization: str, revision: str) -> Evaluated | None:
        try:
            ref = references.load(dg.AssetKey([customization, "eval_report"]), revision)
            summary = read_json(store.open(ref) / "summary.json")
        except (FileNotFoundError, ArtifactError, ValueError):
            return None
        return Evaluated.of(summary, ref.digest, records.get(ref.digest, {}))

    return read


def overview_row(
    spec: CustomizationSpec,
    policy: Policy,
    release: Release | None,
    notes: Mapping[str, Note],
    latest: History | None,
    spent: Spent,
) -> dict[str, str | float]:
    """One line of the overview."""
    look = notes.get("look")
    limits = [
        f"{limit:g} {unit}"
        for limit, unit in ((policy.own.device_seconds, "s"), (policy.own.money, policy.currency))
        if limit is not None
    ]
    return {
        "customization": spec.name,
        "champion": release.adapter_digest[:12] if release else "",
        "base": release.base_revision if release else "",
        "serves since": release.at[:16].replace("T", " ") if release else "",
        "looked at": look.at[:16].replace("T", " ") if look else "",
        "last look": str(look.value["kind"]) if look else "",
        "evidence of change": round(float(look.value.get("e_value", 1.0)), 1) if look else 1.0,
        "last decision": f"{latest.decision.action} ({latest.state})" if latest else "",
        "device seconds": round(spent.device_seconds, 1),
        "money": round(spent.money, 4),
        "budget": ", ".join(limits) or "no limit",
    }


def total(kinds: Mapping[str, Spent]) -> Spent:
    return sum(kinds.values(), NOTHING)


def table(rows: Sequence[Mapping[str, str | float]]) -> dg.TableMetadataValue:
    return dg.MetadataValue.table([dg.TableRecord(dict(row)) for row in rows])
