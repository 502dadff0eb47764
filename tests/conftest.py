"""Tests find each other's helpers, keep state in temporary folders, and never phone home."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

# tests run side by side: two processes that each compute on all cores are far slower than one thread each
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("EVERGREEN_THREADS", "1")
# tiny models learn and answer otherwise in bfloat16, which some processors prefer; the real one may use it
os.environ.setdefault("EVERGREEN_DTYPE", "float32")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["DO_NOT_TRACK"] = "1"


@pytest.fixture(autouse=True)
def evergreen_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty EVERGREEN_HOME of the test's own."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("EVERGREEN_HOME", str(home))
    return home
