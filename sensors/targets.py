"""What the sensors run: the jobs of a customization, or in a large fleet its assets without a job."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition
from dagster._core.execution.stats import StepEventStatus

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


def unfinished_work(instance: dg.DagsterInstance, run: dg.DagsterRun, kind: str) -> set[str]:
    """The customizations for which a run (that has not ended) still makes an asset of `<name>__<kind>`.

    A backfill over a fleet is one run without a customization's tag: each customization is through with it
    when its own steps have ended.
    """
    if (name := run.tags.get(CUSTOMIZATION_TAG)) is not None:
        if run.asset_selection:
            return {name} if any(key.path[-1] in KINDS[kind] for key in run.asset_selection) else set()
        jobs = ("main", "update") if kind in ("main", "update") else (kind,)
        return {name} if run.job_name.rpartition("__")[2] in jobs else set()
    steps = {
        key.to_python_identifier(): key.path[0]
        for key in run.asset_selection or ()
        if len(key.path) == 2 and key.path[-1] in KINDS[kind]
    }
    if run.step_keys_to_execute is not None:  # a repetition of what a run that died had not done
        steps = {step: name for step, name in steps.items() if step in run.step_keys_to_execute}
    if steps and run.status == dg.DagsterRunStatus.STARTED:
        for stats in instance.get_run_step_stats(run.run_id, list(steps)):
            if stats.status is not None and stats.status != StepEventStatus.IN_PROGRESS:
                steps.pop(stats.step_key, None)
    return set(steps.values())
