"""`<name>/drift_report`: whether the traffic, the answers or their quality have moved since the champion was
trained."""

from collections.abc import Iterator

import dagster as dg

from ml_assets.artifacts import ArtifactError
from ml_assets.code_link import code_link
from ml_assets.drift_reports.build import BuiltLook, champion_of, look
from ml_assets.drift_reports.checks import check_results, check_specs
from ml_assets.drift_reports.reference import VERSION
from ml_assets.drift_reports.report import headline
from ml_assets.settings import Settings
from ml_assets.spec import CustomizationSpec
from resources.artifact_store import ARTIFACT_REF, ArtifactStoreResource
from resources.ledger import LedgerResource
from resources.traffic_log import TrafficLogResource


def build_drift_report_asset(spec: CustomizationSpec) -> dg.AssetsDefinition:
    """The drift report asset of one customization: one look at the requests that came since the last one."""
    key = dg.AssetKey([spec.name, "drift_report"])

    @dg.asset(
        key=key,
        dagster_type=ARTIFACT_REF,
        deps=[dg.AssetKey([spec.name, "traffic"]), dg.AssetKey([spec.name, "endpoint"])],
        description=(
            f"Looks at what **{spec.name}** was asked and answered since its champion began to serve: inputs "
            "against the rows it was trained on, outputs and their quality against its answers to the frozen "
            f"rows. At most one false alarm in {spec.drift.one_false_alarm_in}, however often one looks."
        ),
        group_name=spec.name,
        owners=spec.owners,
        kinds={"report"},
        tags={"customization": spec.name},
        metadata=code_link(),
        code_version=spec.version(VERSION, "drift", "evaluation"),
        pool=None if spec.drift.embedding == "hashing" else "device",
        check_specs=check_specs(key),
    )
    def drift_report(
        context: dg.AssetExecutionContext,
        artifact_store: ArtifactStoreResource,
        ledger: LedgerResource,
        traffic_log: TrafficLogResource,
    ) -> Iterator[dg.MaterializeResult]:
        settings, store = Settings.from_env(), artifact_store.store()
        with ledger.opened() as book:
            champion = champion_of(book.history(spec.name))
        try:
            with traffic_log.opened() as log:
                built = look(spec, store, settings.home, champion, log)
        except ArtifactError as error:
            raise dg.Failure(f"nothing to compare with: {error}", allow_retries=False) from error
        context.log.info(headline(built.findings))
        yield dg.MaterializeResult(
            value=built.ref,
            data_version=dg.DataVersion(built.ref.digest),
            metadata=_metadata(built, store.location(built.ref)),
            check_results=check_results(key, built.findings, built.pictures),
        )

    return drift_report


def _metadata(built: BuiltLook, location: str) -> dict[str, dg.MetadataValue]:
    findings, outcome = built.findings, built.findings.outcome
    parts = [f"**{headline(findings)}**"]
    parts += [f"- {signal.description}" for signal in findings.signals]
    parts += [f"![{name}]({picture})" for name, picture in built.pictures.items() if picture]
    metadata: dict[str, dg.MetadataValue] = {
        "summary": dg.MetadataValue.md(
            "\n".join(parts[: 1 + len(findings.signals)])
            + "\n\n"
            + "\n\n".join(parts[1 + len(findings.signals) :])
        ),
        "failed": dg.MetadataValue.bool(bool(findings.looks and findings.looks[-1].failed)),
        "requests": dg.MetadataValue.int(findings.requests),
        "up_to_request": dg.MetadataValue.int(findings.to_seq),
        "alarms": dg.MetadataValue.int(sum(signal.alarm for signal in findings.signals)),
        "labelled": dg.MetadataValue.int(outcome.labelled),
        "path": dg.MetadataValue.path(location),
        "nothing_new": dg.MetadataValue.bool(built.reused),
    }
    for name in ("accuracy", "estimated_accuracy", "value_per_1000", "loss"):
        if (value := getattr(outcome, name)) is not None:
            metadata[name] = dg.MetadataValue.float(round(value, 4))
    return metadata
