"""`<name>/source` (observed) and `<name>/dataset` (its snapshot)."""

import datetime
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
from sqlalchemy.exc import InterfaceError, OperationalError

from ml_assets.code_link import code_link
from ml_assets.datasets.build import build_dataset
from ml_assets.datasets.checks import check_specs, dataset_checks
from ml_assets.datasets.pictures import count_words, length_histogram
from ml_assets.datasets.redaction import RedactionUnavailable
from ml_assets.datasets.snapshot import CODE_VERSION, SnapshotError, load_manifest, load_rows
from ml_assets.datasets.sources import SourceError, describe, read_source
from ml_assets.settings import Settings
from ml_assets.spec import CustomizationSpec
from ml_assets.traffic.store import NewerSchema
from resources.artifact_store import ARTIFACT_REF, ArtifactStoreResource
from resources.ledger import LedgerResource
from resources.traffic_log import TrafficLogResource

SAMPLE = 8
"""Rows of each side in the sample table."""

DATA_VERSION_TAG = "dagster/data_version"

REASONS = {
    "bad_row": "not readable, or a column of the prompt is missing or empty",
    "exact_duplicate": "repeats another row",
    "near_duplicate": "nearly another training row, with the same target",
    "conflicting_label": "its input also has another target",
    "leak_exact": "training row with the input of an evaluation row",
    "leak_near": "training row that is nearly an evaluation row",
    "leak_group": "training row of a group that evaluates",
    "feedback_unusable": "right answer that does not have the form of the prompt, or question that has not",
    "feedback_repeats": "right answer that the source, or other feedback, has already",
    "feedback_conflict": "right answer that contradicts the source on nearly the same input",
    "feedback_distrusted": "right answer of a key that contradicts the source too often",
    "feedback_share": "right answer beyond its key's share (feedback.max_share_per_key)",
    "feedback_doubtful": "right answer unlike the source's for the inputs most like its own, one of too many",
    "feedback_disagrees": "right answer that contradicts other feedback on nearly the same input",
    "parent_without_column": "evaluation row of the snapshot before, without a column that the prompt needs",
    "parent_overruled": "evaluation row from feedback; the source, or the operator, has another target now",
    "parent_unscorable": "evaluation row of the snapshot before, with a target that cannot be scored",
}


class Refused(Exception):
    """A snapshot that a blocking check refuses."""

    def __init__(self, results: list[dg.AssetCheckResult], record: Mapping[str, Any]) -> None:
        self.results, self.record = results, record
        super().__init__("; ".join(f"{r.check_name}: {r.description}" for r in results if _blocks(r)))


def build_source_asset(spec: CustomizationSpec, root: Path) -> dg.AssetsDefinition:
    """The observable source of one customization: its data version is the hash of its rows."""
    key = dg.AssetKey([spec.name, "source"])

    with warnings.catch_warnings():  # it is in beta, and the only observable asset that can have owners
        warnings.simplefilter("ignore", dg.BetaWarning)
        observable = dg.multi_observable_source_asset(
            name=f"{spec.name}__source",
            specs=[
                dg.AssetSpec(
                    key,
                    description=f"Where the rows of **{spec.name}** come from: `{describe(spec.source)}`. "
                    "Its data version is a hash of the rows: observing it says whether they changed.",
                    group_name=spec.name,
                    owners=spec.owners,
                    kinds={"json" if spec.source.kind == "jsonl" else spec.source.kind},
                    tags={"customization": spec.name},
                    metadata=code_link(),
                )
            ],
        )

    @observable
    def source(context: dg.AssetExecutionContext, ledger: LedgerResource) -> dg.ObserveResult:
        try:
            rows = read_source(spec.source, root, Settings.from_env())
        except SourceError as error:
            raise dg.Failure(str(error), allow_retries=isinstance(error.__cause__, OSError)) from error
        with ledger.decisions() as book:
            book.note(spec.name, "source", {"version": rows.version()})
        return dg.ObserveResult(
            asset_key=key,
            data_version=dg.DataVersion(rows.version()),
            metadata={
                "dagster/row_count": len(rows.rows),
                "unreadable_rows": len(rows.bad),
                "columns": ", ".join(rows.columns),
            },
        )

    return source


def build_dataset_asset(spec: CustomizationSpec, root: Path) -> dg.AssetsDefinition:
    """The dataset asset of one customization. A snapshot that a blocking check refuses is not published."""
    key = dg.AssetKey([spec.name, "dataset"])
    source_key = dg.AssetKey([spec.name, "source"])
    fresh = spec.freshness.dataset

    @dg.asset(
        key=key,
        dagster_type=ARTIFACT_REF,
        deps=[source_key],
        description=(
            f"Snapshot of the rows of **{spec.name}**: personal data replaced, duplicates and contradictions "
            f"removed, right answers of users added, {spec.dataset.evaluation_share:.0%} held out for "
            "evaluation by hash. Evaluation rows "
            f"are kept for ever; a row never changes sides. {spec.description}"
        ),
        group_name=spec.name,
        owners=spec.owners,
        kinds={"parquet"},
        tags={"customization": spec.name},
        metadata=code_link(),
        code_version=spec.version(CODE_VERSION, "source", "dataset", "prompt", "feedback"),
        freshness_policy=dg.FreshnessPolicy.time_window(fail_window=_duration(fresh)) if fresh else None,
        check_specs=check_specs(key),
    )
    def dataset(
        context: dg.AssetExecutionContext,
        artifact_store: ArtifactStoreResource,
        traffic_log: TrafficLogResource,
        ledger: LedgerResource,
    ) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
        def accept(record: Mapping[str, Any]) -> None:
            results = dataset_checks(key, spec, record)
            if any(_blocks(result) for result in results):
                raise Refused(results, record)

        store = artifact_store.store()
        try:
            judged = traffic_log.feedback(spec.name) if spec.feedback.use == "labels" else []
            built = build_dataset(spec, root, Settings.from_env(), store, accept, judged)
        except Refused as error:
            yield from error.results
            raise dg.Failure(
                f"the dataset is refused, the one before stays: {error}",
                metadata=_findings(error.record),
                allow_retries=False,
            ) from error
        except (SourceError, SnapshotError, RedactionUnavailable) as error:
            raise dg.Failure(str(error), allow_retries=isinstance(error.__cause__, OSError)) from error
        except (OperationalError, InterfaceError, NewerSchema) as error:
            # without it the rows that came from feedback would go, as if they had never been there
            raise dg.Failure(
                f"the feedback can't be read, expected the database at EVERGREEN_TRAFFIC_URL: {error}",
                allow_retries=not isinstance(error, NewerSchema),
            ) from error
        if built.reused:
            context.log.info(f"{built.ref}: the source is as it was, nothing to do")
        # what was read just now is the version that this dataset is of: else the UI calls it stale at once
        context.log_event(
            dg.AssetObservation(asset_key=source_key, tags={DATA_VERSION_TAG: built.source_version})
        )
        context.get_step_execution_context().wipe_input_asset_version_info(source_key)
        with ledger.decisions() as book:
            train_rows = built.record["rows"]["train"]
            known = {"digest": built.ref.digest, "source_version": built.source_version}
            book.note(spec.name, "dataset", known | {"train_rows": train_rows})
            book.note(spec.name, "source", {"version": built.source_version})
        directory = store.open(built.ref)
        yield dg.MaterializeResult(
            value=built.ref,
            data_version=dg.DataVersion(built.ref.digest),
            metadata={
                **_findings(built.record),
                **_pictures(spec, directory),
                "digest": dg.MetadataValue.text(built.ref.digest),
                "built_before": dg.MetadataValue.bool(built.reused),
                "manifest": dg.MetadataValue.json(load_manifest(directory)),
                "path": dg.MetadataValue.path(str(directory)),
            },
            check_results=dataset_checks(key, spec, built.record),
        )

    return dataset


def _blocks(result: dg.AssetCheckResult) -> bool:
    return not result.passed and result.severity == dg.AssetCheckSeverity.ERROR


def _duration(text: str) -> datetime.timedelta:
    unit = {"m": "minutes", "h": "hours", "d": "days"}[text[-1]]
    return datetime.timedelta(**{unit: int(text[:-1])})


def _findings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Counts and tables of a build."""
    rows = record["rows"]
    metadata: dict[str, Any] = {
        "dagster/row_count": rows["train"] + rows["evaluation"],
        "train_rows": rows["train"],
        "evaluation_rows": rows["evaluation"],
        "evaluation_rows_kept": record["measured"]["kept_from_parent"],
        "removed_rows": sum(record["removed"].values()),
        "redacted": sum(record["redacted"].values()),
    }
    if without := record["measured"].get("kept_without_group"):
        metadata["evaluation_rows_of_no_known_group"] = without
    if said := record.get("feedback"):
        metadata |= {
            "feedback_given": said["given"],
            "feedback_rows": said["rows"]["feedback"],
            "feedback_rows_with_the_models_own_answer": said["rows"]["champion"],
        }
    tables = {
        "removed": [
            {"reason": reason, "rows": number, "what": REASONS[reason]}
            for reason, number in record["removed"].items()
        ],
        "removed_examples": record["examples"],
        "redacted_by_kind": [{"kind": kind, "found": n} for kind, n in record["redacted"].items()],
        "segments": [
            {"segment": column, "value": value, **sides}
            for column, values in record["measured"]["segments"].items()
            for value, sides in values.items()
        ],
    }
    return metadata | {
        name: dg.MetadataValue.table([dg.TableRecord(row) for row in table])
        for name, table in tables.items()
        if table
    }


def _pictures(spec: CustomizationSpec, directory: Path) -> dict[str, Any]:
    """Lengths and a sample of the rows, as the model sees them."""
    sides = {side: load_rows(directory, side) for side in ("train", "evaluation")}
    rendered = {
        side: [
            {"user": spec.prompt.user.format_map(row), "target": spec.prompt.target.format_map(row)}
            for row in rows
        ]
        for side, rows in sides.items()
    }
    rows = [*rendered["train"], *rendered["evaluation"]]
    sample = [
        dg.TableRecord({"split": side, **{name: text[:200] for name, text in row.items()}})
        for side, rows_of_side in rendered.items()
        for row in rows_of_side[:SAMPLE]
    ]
    return {
        "lengths": dg.MetadataValue.md(
            length_histogram({name: [count_words(row[name]) for row in rows] for name in ("user", "target")})
        ),
        "sample": dg.MetadataValue.table(sample),
    }
