"""Base revisions as partitions, which more than one process adds."""

import threading
from pathlib import Path

import dagster as dg

from ml_assets.base_models.partitions import BASE_MODELS, add_revisions


def test_revisions_that_several_add_at_once_are_added_once(tmp_path: Path) -> None:
    (tmp_path / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    clients, rounds = 2, 40
    together = threading.Barrier(clients, timeout=30)
    failures: list[Exception] = []
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        add_revisions(instance, ["tiny@first"])  # makes the database

    def add() -> None:
        with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
            for number in range(rounds):
                together.wait()
                try:
                    add_revisions(instance, ["tiny@first", f"tiny@{number}"])
                except Exception as error:
                    failures.append(error)

    threads = [threading.Thread(target=add) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        found = instance.get_dynamic_partitions(str(BASE_MODELS.name))
    assert sorted(found) == sorted(["tiny@first", *(f"tiny@{number}" for number in range(rounds))])
