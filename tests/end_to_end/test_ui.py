"""What an operator does in the browser: materialize a customization for a base revision from the asset graph,
see checks and report, follow the link to MLflow. Headless Chromium against a whole deployment."""

import contextlib
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from customizations import COLOURS_YAML, Project, base_models_yaml, colour_rows
from dagster import AssetKey, DagsterInstance
from tiny_models import tiny_model

from ml_assets.base_models.partitions import BASE_MODELS
from ml_assets.base_models.register import register_revisions
from ml_assets.cli import supervisor
from ml_assets.customization import BaseModels
from ml_assets.settings import Settings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed"),
]

CUSTOMIZATION = COLOURS_YAML.replace(
    "  evaluation:\n",
    "  adapter: {rank: 64, alpha: 64, steps: 140, batch_tokens: 512, learning_rate: 0.005}\n  evaluation:\n"
    "    few_shot: 1\n    max_new_tokens: 6\n    gate: {max_forgetting: 20}\n",
)
CHROMIUM = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WAIT = 60_000


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def deployment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Settings, str]]:
    """A deployment that is up, with one customization and one base revision; nothing is materialized."""
    with deployed(tmp_path, monkeypatch, CUSTOMIZATION) as found:
        yield found


@contextlib.contextmanager
def deployed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, customization: str
) -> Iterator[tuple[Settings, str]]:
    project = Project.create(tmp_path / "shop")
    project.write("bases", base_models_yaml({"tiny": tiny_model("llama", tmp_path / "tiny")}))
    project.write("colours", customization, colour_rows(400))
    monkeypatch.setenv("EVERGREEN_HOME", str(tmp_path / "home"))
    for variable in supervisor.PORTS.values():
        monkeypatch.setenv(variable, str(free_port()))
    monkeypatch.setenv(supervisor.MODULE_VARIABLE, f"{project.package}.definitions")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(project.root), str(supervisor.ROOT)]))
    settings = Settings.from_env()
    try:
        assert supervisor.start(settings)
        tree = project.definitions().component_tree
        assert tree is not None
        (bases,) = tree.get_all_components(BaseModels)
        with DagsterInstance.from_config(str(settings.dagster_home)) as instance:
            (revision,) = register_revisions(
                bases.spec.families,
                bases.origin.file.parent,
                settings,
                lambda names: instance.add_dynamic_partitions(str(BASE_MODELS.name), names),
            )
        yield settings, revision
    finally:
        supervisor.stop(settings)


def test_materialize_from_the_asset_graph_and_read_the_report(
    deployment: tuple[Settings, str], tmp_path: Path
) -> None:
    from playwright.sync_api import expect, sync_playwright

    settings, revision = deployment
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM)
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.set_default_timeout(WAIT)

        for group in ("base_models", "colours"):
            page.goto(f"{settings.dagster_url}/locations/evergreen/asset-groups/{group}/lineage")
            page.locator("button", has_text=re.compile("^Materialize")).first.click()
            dialog = page.get_by_role("dialog")
            expect(dialog).to_be_visible()
            dialog.get_by_role("button", name="All", exact=True).click()
            page.screenshot(path=tmp_path / f"{group}-dialog.png")
            dialog.locator("button", has_text=re.compile("^Launch")).click()
            last = AssetKey("base_model") if group == "base_models" else AssetKey(["colours", "endpoint"])
            wait_for_materialization(settings, last)

        page.goto(f"{settings.dagster_url}/assets/colours/eval_report?view=checks")
        expect(page.get_by_text("gate").first).to_be_visible()
        page.screenshot(path=tmp_path / "checks.png")
        page.goto(f"{settings.dagster_url}/assets/colours/eval_report?view=events&partition={revision}")
        link = page.locator("a", has_text=re.compile("experiments/.*report.html")).first
        expect(link).to_be_visible()
        page.screenshot(path=tmp_path / "report.png")
        page.goto(str(link.get_attribute("href")))
        expect(page.get_by_text(f"colours on {revision}").first).to_be_visible()
        page.screenshot(path=tmp_path / "mlflow.png")
        browser.close()


def wait_for_materialization(settings: Settings, key: AssetKey, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    with DagsterInstance.from_config(str(settings.dagster_home)) as instance:
        while instance.get_latest_materialization_event(key) is None:
            failed = [run for run in instance.get_runs() if run.status.value == "FAILURE"]
            assert not failed, f"run {failed[0].run_id} failed: {supervisor.log_path(settings)}"
            assert time.monotonic() < deadline, f"{key.to_user_string()} was not materialized"
            time.sleep(0.5)
