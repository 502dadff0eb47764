"""How a run carries out its steps: in its own process, and those of many customizations by their value."""

from collections.abc import Iterator

import dagster as dg
from dagster._core.events import DagsterEvent, EngineEventData
from dagster._core.execution.context.system import PlanOrchestrationContext
from dagster._core.execution.plan.plan import ExecutionPlan
from dagster._core.execution.plan.step import ExecutionStep
from dagster._core.execution.retries import RetryMode
from dagster._core.executor.in_process import InProcessExecutor
from dagster._core.storage.tags import PRIORITY_TAG

from ml_assets.decisions.book import DecisionBook
from ml_assets.fleet.migration_plan import carried_out_in_order
from resources.ledger import LedgerResource

CARRIED = ("adapter", "eval_report")


@dg.executor(name="by_value")
def by_value_executor(_: dg.InitExecutorContext) -> "ByValueExecutor":
    """Steps one after the other in the process of the run: heavy imports and the base model are loaded once,
    not for every step. A run over many customizations, such as a migration's, takes the most valuable first:
    adapter and eval report, so that its endpoint can move while the rest goes on."""
    return ByValueExecutor(retries=RetryMode.ENABLED)


class ByValueExecutor(InProcessExecutor):
    """The in-process executor, over a plan whose steps have priorities."""

    def execute(
        self, plan_context: PlanOrchestrationContext, execution_plan: ExecutionPlan
    ) -> Iterator[DagsterEvent]:
        run = plan_context.dagster_run
        partition = run.tags.get("dagster/partition")
        names = {
            name
            for key in execution_plan.step_keys_to_execute
            for name, _, kind in [key.rpartition("__")]
            if kind in CARRIED
        }
        if partition is not None and len(names) > 1:
            with LedgerResource().opened() as ledger:
                order = carried_out_in_order(DecisionBook(ledger), partition, names)
            set_priorities(execution_plan, order)
            text = f"By value at stake: {', '.join(order)}"
            yield DagsterEvent.engine_event(plan_context, text, EngineEventData())
        yield from super().execute(plan_context, execution_plan)


def set_priorities(plan: ExecutionPlan, order: list[str]) -> None:
    """Give the steps of the first customization priority 0 and those of the next ones -1, -2, ...: other runs
    (0), such as a release, get the device before the rest of a migration does."""
    for handle, step in list(plan.step_dict.items()):
        name, _, kind = step.key.rpartition("__")
        if isinstance(step, ExecutionStep) and kind in CARRIED and name in order:
            tags = {**step.tags, PRIORITY_TAG: str(-order.index(name))}
            plan.step_dict[handle] = plan.step_dict_by_key[step.key] = step._replace(tags=tags)
