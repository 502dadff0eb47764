"""Notices new revisions of the base models that customizations follow."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from pathlib import Path

import dagster as dg

from ml_assets.base_models.identity import BaseModelError
from ml_assets.base_models.partitions import BASE_MODELS
from ml_assets.base_models.register import current_revision
from ml_assets.spec import BaseFamily
from resources.base_model_hub import BaseModelHub

PATIENCE = 20.0  # seconds that a tick waits; Dagster gives up on a tick after 60


def build_base_updates_sensor(
    families: Sequence[BaseFamily], root: Path, patience: float = PATIENCE
) -> dg.SensorDefinition:
    """A sensor that adds a partition when the source of a family holds new content.

    It looks at sizes and times first, and hashes content only when those changed. A source that takes longer
    than `patience` seconds to download and hash goes on in a thread, and the next tick looks again. One that
    fails does not hold up the others. The sensor keeps no cursor: what it does follows from the sources and
    the partitions that exist.
    """
    lookups: dict[str, Future[str]] = {}

    @dg.sensor(
        name="base_updates",
        target=dg.AssetSelection.assets("base_model"),
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Adds a partition for each new revision of a followed base model: "
        + ", ".join(family.name for family in families),
    )
    def base_updates(
        context: dg.SensorEvaluationContext, base_model_hub: BaseModelHub
    ) -> dg.SensorResult | dg.SkipReason:
        for family in families:
            if family.name not in lookups:
                arguments = (family, root, base_model_hub.settings(), base_model_hub.access())
                lookups[family.name] = _start(current_revision, *arguments)
        wait(lookups.values(), timeout=patience)
        existing = set(context.instance.get_dynamic_partitions(str(BASE_MODELS.name)))
        new, unchanged, failed = [], [], []
        for name in [name for name, lookup in lookups.items() if lookup.done()]:
            lookup = lookups.pop(name)
            error = lookup.exception()
            if error is not None:
                failed.append(f"{name}: {error}")
            else:
                (unchanged if lookup.result() in existing else new).append(lookup.result())
        if failed and not new:
            raise BaseModelError("; ".join(failed))
        for problem in failed:
            context.log.error(problem)
        if new:
            return dg.SensorResult(
                dynamic_partitions_requests=[BASE_MODELS.build_add_request(new)],
                # no run is launched, so Dagster shows the tick as skipped
                skip_reason=f"new base revisions: {', '.join(new)}",
            )
        reasons = [f"unchanged: {', '.join(unchanged)}"] if unchanged else []
        reasons += [f"still being downloaded or hashed: {', '.join(lookups)}"] if lookups else []
        return dg.SkipReason("; ".join(reasons) or "no base model is declared")

    return base_updates


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
