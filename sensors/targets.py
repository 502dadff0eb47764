"""What the sensors run: the jobs of a customization, or in a large fleet its assets without a job."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

from ml_assets.decisions.tags import CUSTOMIZATION_TAG

Job = dg.JobDefinition | UnresolvedAssetJobDefinition

KINDS: Mapping[str, tuple[str, ...]] = {
    "main": ("dataset", "adapter", "eval_report", "endpoint"),
    "update": ("dataset", "adapter", "eval_report", "endpoint"),
    "look": ("traffic", "drift_report", "decision"),
    "observe": ("source",),
}
"""The assets of each job `<name>__<kind>`."""


@dataclass(frozen=True)
class Targets:
    """What a sensor may run; `jobs` is empty in a fleet that is too large for jobs."""

    jobs: Sequence[Job]

    def options(self) -> dict[str, Any]:
        """For the decorator of the sensor."""
        if self.jobs:
            return {"jobs": self.jobs}
        with warnings.catch_warnings():  # in beta: sources and traffic are observed, not made
            warnings.simplefilter("ignore", dg.BetaWarning)
            return {"asset_selection": dg.AssetSelection.all(include_sources=True)}

    def request(
        self, name: str, kind: str, run_key: str, assets: Sequence[str] = (), **options: Any
    ) -> dg.RunRequest:
        """A run of `<name>__<kind>`, or of some of its assets, under the customization's tag."""
        tags = {**options.pop("tags", {}), CUSTOMIZATION_TAG: name}
        selected = [dg.AssetKey([name, one]) for one in assets] or None
        if self.jobs:
            job = f"{name}__{kind}"
            return dg.RunRequest(run_key, job_name=job, asset_selection=selected, tags=tags, **options)
        selected = selected or [dg.AssetKey([name, one]) for one in KINDS[kind]]
        return dg.RunRequest(run_key, asset_selection=selected, tags=tags, **options)


def changes(run: dg.DagsterRun) -> bool:
    """Whether a run changes what serves or what it is made of."""
    return _any_of(run, KINDS["main"], ("main", "update"))


def looks(run: dg.DagsterRun) -> bool:
    """Whether a run looks at the traffic."""
    return _any_of(run, KINDS["look"], ("look",))


def _any_of(run: dg.DagsterRun, assets: Sequence[str], jobs: Sequence[str]) -> bool:
    if run.asset_selection:
        return any(key.path[-1] in assets for key in run.asset_selection)
    return run.job_name.rpartition("__")[2] in jobs
