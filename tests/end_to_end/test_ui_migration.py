"""A migration by hand, as an operator does it in the browser: a new base revision is there, the adapters are
selected, the backfill for the new partition is launched and watched, the report is opened. Headless Chromium
against a whole deployment."""

import contextlib
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from dagster import AssetKey, DagsterInstance
from dagster._core.execution.backfill import BulkActionStatus
from safetensors.torch import load_file, save_file
from test_ui import CHROMIUM, CUSTOMIZATION, WAIT, deployed

from ml_assets.base_models.partitions import BASE_MODELS
from ml_assets.cli.runs import ASSET_JOB, Dagster
from ml_assets.decisions.book import DecisionBook
from ml_assets.endpoints.ledger import Ledger
from ml_assets.settings import Settings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed"),
]
T = TypeVar("T")
# a margin that this few rows can show, also when the looks of several rungs share the error rate
BY_HAND = CUSTOMIZATION.replace("gate: {", "gate: {margin: 0.1, ") + "  migration: {mode: record}\n"


def publish_minor_revision(folder: Path) -> None:
    """All weights move a little, as after a short continued training."""
    import torch

    generator = torch.Generator().manual_seed(7)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    moved = {
        name: value
        + 0.01 * value.float().std() * torch.randn(value.shape, generator=generator).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in tensors.items()
    }
    save_file(moved, path.with_suffix(".new"), metadata={"format": "pt"})
    path.with_suffix(".new").replace(path)


def wait_for(look: Callable[[], T | None], seconds: float, settings: Settings) -> T:
    deadline = time.monotonic() + seconds
    while (found := look()) is None:
        assert time.monotonic() < deadline, f"not in time: see {settings.logs}"
        time.sleep(0.5)
    return found


def first_release(settings: Settings, revision: str, *names: str) -> None:
    """The base model and the main jobs on the first revision."""
    with DagsterInstance.from_config(str(settings.dagster_home)) as instance:
        dagster = Dagster(settings.dagster_url, instance)
        base = dagster.launch(ASSET_JOB, assets=[AssetKey("base_model")], partition=revision)
        dagster.follow(base, print)
        for name in names:
            dagster.follow(dagster.launch(f"{name}__main", partition=revision), print)


def decided(settings: Settings) -> str | None:
    """State of the decision to migrate."""
    with contextlib.closing(Ledger(settings.ledger_url)) as ledger:
        histories = DecisionBook(ledger).migrations()
    return histories[0].state if histories else None


def serving(settings: Settings) -> str | None:
    with contextlib.closing(Ledger(settings.ledger_url)) as ledger:
        release = ledger.current("colours")
    return release.base_revision if release else None


def test_a_person_launches_the_backfill_and_opens_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sensor finds the new revision, has it probed and writes down what a migration would cost; a person
    launches it. The old partition is selected too: nothing in it changed, so it costs nothing, and the UI
    makes one backfill of several partitions (of one it makes a run)."""
    from playwright.sync_api import expect, sync_playwright

    monkeypatch.setenv("EVERGREEN_SENSOR_SECONDS", "2")
    with (
        deployed(tmp_path, monkeypatch, BY_HAND) as (settings, old),
        DagsterInstance.from_config(str(settings.dagster_home)) as instance,
        sync_playwright() as playwright,
    ):
        first_release(settings, old, "colours")
        publish_minor_revision(tmp_path / "tiny")
        assert wait_for(lambda: decided(settings), 120, settings) == "record_only"
        revisions = instance.get_dynamic_partitions(str(BASE_MODELS.name))
        (new,) = set(revisions) - {old}
        assert list(instance.get_backfills()) == []

        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM)
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.set_default_timeout(WAIT)
        page.goto(f"{settings.dagster_url}/assets/fleet/migration_plan?view=overview")
        expect(page.get_by_text("record_only").first).to_be_visible()
        page.screenshot(path=tmp_path / "plan.png")

        page.goto(f"{settings.dagster_url}/locations/evergreen/asset-groups/colours/lineage")
        page.get_by_text("adapter", exact=True).first.click()
        page.get_by_text("eval_report", exact=True).first.click(modifiers=["Shift"])
        page.locator("button", has_text=re.compile("^Materialize selected")).first.click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_text("Select a partition or create one").click()
        for revision in (old, new):
            page.get_by_text(revision, exact=True).first.click()
        page.keyboard.press("Escape")
        page.screenshot(path=tmp_path / "dialog.png")
        dialog.locator("button", has_text=re.compile("^Launch")).click()
        backfill = wait_for(lambda: next(iter(instance.get_backfills()), None), 60, settings)

        page.goto(f"{settings.dagster_url}/runs/b/{backfill.backfill_id}")
        expect(page.get_by_text(backfill.backfill_id).first).to_be_visible()
        page.screenshot(path=tmp_path / "backfill.png")

        def ended() -> BulkActionStatus | None:
            found = instance.get_backfill(backfill.backfill_id)
            assert found is not None
            return found.status if found.status.value.startswith("COMPLETED") else None

        assert wait_for(ended, 300, settings) == BulkActionStatus.COMPLETED_SUCCESS
        page.reload()
        expect(page.get_by_text("100% completed")).to_have_count(2)  # adapters and eval reports
        page.screenshot(path=tmp_path / "completed.png")
        with contextlib.closing(Ledger(settings.ledger_url)) as ledger:
            costs = DecisionBook(ledger).costs("colours")
        assert [(c.kind, c.partition) for c in costs if c.partition == old and c.kind == "training"] == [
            ("training", old)
        ], "what is unchanged is not trained again"

        page.goto(f"{settings.dagster_url}/assets/colours/eval_report?view=events&partition={new}")
        link = page.locator("a", has_text=re.compile("experiments/.*report.html")).first
        expect(link).to_be_visible()
        page.goto(str(link.get_attribute("href")))
        expect(page.get_by_text(f"colours on {new}").first).to_be_visible()
        page.screenshot(path=tmp_path / "report.png")

        # the gate has accepted, so the endpoint moves by itself
        wait_for(lambda: serving(settings) == new or None, 180, settings)
        browser.close()
