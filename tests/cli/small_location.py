"""A small code location for the tests of operation: assets that take a while or fail on demand."""

import os
import time
from pathlib import Path

import dagster as dg

BASES = dg.DynamicPartitionsDefinition(name="base_models")


@dg.asset(partitions_def=BASES, pool="device")
def slow(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    """Says that it works, until the file `finish` exists in the data directory."""
    home = Path(os.environ["EVERGREEN_HOME"])
    with (home / f"{context.run_id}.log").open("a") as log:
        log.write(f"{context.partition_key} {os.getpid()}\n")
    while not (home / "finish").exists():
        time.sleep(0.05)
    return dg.MaterializeResult(metadata={"partition": context.partition_key})


@dg.asset(deps=[slow])
def after() -> None:
    """Follows `slow`."""


@dg.asset
def broken() -> None:
    """Fails like bad data does."""
    raise dg.Failure("row 3: expected a name", allow_retries=False)


defs = dg.Definitions(assets=[slow, after, broken], executor=dg.in_process_executor)
