"""A Dagster daemon of its own, as a process that tests may kill."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start_daemon(home: Path, dagster_home: Path, **environment: str) -> subprocess.Popen[bytes]:
    """`dagster-daemon run` over the workspace.yaml in `dagster_home`; it writes to `home`/daemon.log."""
    path = os.pathsep.join(str(p) for p in (ROOT, ROOT / "tests", ROOT / "tests" / "sensors"))
    env = os.environ | {
        "EVERGREEN_HOME": str(home),
        "DAGSTER_HOME": str(dagster_home),
        "PYTHONPATH": path,
        "DAGSTER_DISABLE_TELEMETRY": "1",
        "PATH": os.defpath,  # runs must start although no command `dagster` is found
    }
    with (home / "daemon.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "dagster._daemon", "run", "-w", "workspace.yaml"],
            cwd=dagster_home,
            env=env | environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
