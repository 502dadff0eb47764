"""`<name>/traffic`: what the endpoint of one customization was asked and answered, observed."""

import warnings
from typing import Any

import dagster as dg
from sqlalchemy.exc import InterfaceError, OperationalError

from ml_assets.code_link import code_link
from ml_assets.spec import CustomizationSpec
from ml_assets.traffic.store import Head, NewerSchema
from ml_assets.traffic.summary import RECENT, Summary, summarize, time_series
from resources.traffic_log import TrafficLogResource

SAMPLE = 8
"""Newest requests in the sample table."""


def build_traffic_asset(spec: CustomizationSpec) -> dg.AssetsDefinition:
    """The observable traffic of one customization: its data version is the number of the last request."""
    key = dg.AssetKey([spec.name, "traffic"])

    with warnings.catch_warnings():  # it is in beta, and the only observable asset that can have owners
        warnings.simplefilter("ignore", dg.BetaWarning)
        observable = dg.multi_observable_source_asset(
            name=f"{spec.name}__traffic",
            specs=[
                dg.AssetSpec(
                    key,
                    deps=[dg.AssetKey([spec.name, "endpoint"])],
                    description=f"What the endpoint of **{spec.name}** was asked and answered, and what "
                    f"users said about it, without personal data; kept for {spec.traffic.retention}. The "
                    "gateway writes it; observing it says how much is new.",
                    group_name=spec.name,
                    owners=spec.owners,
                    kinds={"sql"},
                    tags={"customization": spec.name},
                    metadata=code_link(),
                )
            ],
        )

    @observable
    def traffic(context: dg.AssetExecutionContext, traffic_log: TrafficLogResource) -> dg.ObserveResult:
        try:
            with traffic_log.opened() as log:
                head = log.heads().get(spec.name, Head(spec.name))
                newest = log.newest(spec.name, RECENT)
                first = newest[0].seq if newest else None
                judged = {one.request.id: one.feedback for one in log.feedback(spec.name, from_seq=first)}
        except (OperationalError, InterfaceError, NewerSchema) as error:
            raise dg.Failure(
                f"the traffic can't be read, expected the database at EVERGREEN_TRAFFIC_URL: {error}",
                allow_retries=not isinstance(error, NewerSchema),
            ) from error
        return dg.ObserveResult(
            asset_key=key,
            data_version=dg.DataVersion(str(head.last_seq)),
            metadata=_metadata(head, summarize(spec, newest, judged)),
        )

    return traffic


def _metadata(head: Head, summary: Summary) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "dagster/row_count": head.requests,
        "requests": head.requests,
        "requests_not_stored": head.unlogged,
        "last_seq": head.last_seq,
        "labelled": head.labelled,
        "last_feedback_seq": head.last_feedback_seq,
    }
    if head.last_at:
        metadata["last_request_at"] = head.last_at
    if summary.requests:
        metadata |= {name: value for name, value in summary.numbers.items() if value is not None}
        metadata["over_time"] = dg.MetadataValue.md(time_series(summary))
        metadata["sample"] = dg.MetadataValue.table([dg.TableRecord(row) for row in summary.rows[:SAMPLE]])
    return metadata
