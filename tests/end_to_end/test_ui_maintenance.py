"""What an operator sees when a customization decays: the failed check, the decision, and the run that it
started, in headless Chromium against a whole deployment that nobody touches."""

import contextlib
import random
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from dagster import AssetKey, DagsterInstance
from test_ui import CHROMIUM, CUSTOMIZATION, WAIT, deployed

from ml_assets.cli.runs import ASSET_JOB, Dagster
from ml_assets.decisions.book import DecisionBook, History
from ml_assets.endpoints.gateway import keys
from ml_assets.endpoints.ledger import Ledger
from ml_assets.settings import Settings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed"),
]

MAINTAINED = (
    CUSTOMIZATION
    + """\
  drift: {every: 120, one_false_alarm_in: 30d, embedding: hashing}
  maintenance: {failed_looks: 1, of_looks: 1, cooldown: 1m, min_new_rows: 20}
"""
)
NEW_WORDS = {"red": "crimson", "green": "emerald", "blue": "azure"}


def test_the_failed_check_the_decision_and_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from playwright.sync_api import expect, sync_playwright

    monkeypatch.setenv("EVERGREEN_SENSOR_SECONDS", "2")
    with deployed(tmp_path, monkeypatch, MAINTAINED) as (settings, revision):
        with DagsterInstance.from_config(str(settings.dagster_home)) as instance:
            dagster = Dagster(settings.dagster_url, instance)
            base = dagster.launch(ASSET_JOB, assets=[AssetKey("base_model")], partition=revision)
            dagster.follow(base, print)
            dagster.follow(dagster.launch("colours__main", partition=revision), print)
        ask_in_new_words(settings, 130)
        decided = wait_for(lambda: acted(settings), 300, settings)
        assert decided.decision.seen["loss"] > 0.02 and decided.end is not None

        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM)
            page = browser.new_page(viewport={"width": 1600, "height": 1000})
            page.set_default_timeout(WAIT)

            page.goto(f"{settings.dagster_url}/assets/colours/drift_report?view=checks")
            page.get_by_text("outcome_feedback").first.click()
            expect(page.get_by_text("Failed").first).to_be_visible()
            page.screenshot(path=tmp_path / "check.png")

            page.goto(f"{settings.dagster_url}/assets/colours/decision?view=overview")
            expect(page.get_by_text("incremental_update").first).to_be_visible()
            expect(page.get_by_text("Diagnosis").first).to_be_visible()
            link = page.locator("a[href*='runs?q']").first
            expect(link).to_be_visible()
            page.screenshot(path=tmp_path / "decision.png")

            page.goto(str(link.get_attribute("href")))
            expect(page.get_by_text("colours__update").first).to_be_visible()
            page.screenshot(path=tmp_path / "run.png")
            browser.close()


def ask_in_new_words(settings: Settings, count: int) -> None:
    """Requests in words that the model was never trained on, by several users who say what was right."""
    with contextlib.closing(Ledger(settings.ledger_url)) as ledger:
        users = [keys.create(ledger, ["colours"])[0] for _ in range(12)]
    chance = random.Random(0)
    texts = [
        (f"please paint my {chance.choice(['boat', 'fence', 'piano', 'shed'])} {word} {i} times", right)
        for i in range(count)
        for right, word in [chance.choice(sorted(NEW_WORDS.items()))]
    ]

    def one(i: int) -> None:
        text, right = texts[i]
        headers = {"Authorization": f"Bearer {users[i % len(users)]}"}
        with httpx.Client(base_url=settings.gateway_url, headers=headers, timeout=60) as client:
            body = {"model": "colours", "messages": [{"role": "user", "content": text}]}
            answer = client.post("/v1/chat/completions", json=body).raise_for_status().json()
            said = {"id": answer["id"], "right_answer": right}
            client.post("/v1/feedback", json=said).raise_for_status()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(count)))


def acted(settings: Settings) -> History | None:
    """The decision to update, once its run has ended."""
    with contextlib.closing(Ledger(settings.ledger_url)) as ledger:
        found = DecisionBook(ledger).latest("colours", 10)
    trained = [one for one in found if one.decision.action == "incremental_update" and not one.is_open]
    return trained[0] if trained else None


def wait_for(look: Callable[[], History | None], seconds: float, settings: Settings) -> History:
    deadline = time.monotonic() + seconds
    while (found := look()) is None:
        assert time.monotonic() < deadline, f"nothing was decided: see {settings.logs}"
        time.sleep(0.5)
    return found
