"""The history of a product, replayed: `make demo-drift`.

A model learns the voice commands of a 2023 release. Households talk to it; then the product gets the commands
of a later release, with other wordings and new intents, and a second language. Seven of nine requests come
back with the right answer. Nobody touches anything: sensors look at the traffic, decisions are made and
recorded, the adapter is updated, evaluated and promoted. At the end stands the accuracy over time, next to
the same system without maintenance.

Time is counted in requests: when enough came for a look, the households wait until it was taken and what it
decided is done, so that the replay gives the same history on a fast and on a slow machine.
"""

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from examples.demonstration import demonstrate
from examples.home_commands.history.picture import draw
from examples.home_commands.source import utterances
from ml_assets.artifacts import ArtifactRef, ArtifactStore
from ml_assets.cli.demo import brought_up, clock
from ml_assets.cli.supervisor import MODULE_VARIABLE, OperationError, print_urls
from ml_assets.datasets.feedback import same_answer
from ml_assets.decisions.book import DecisionBook
from ml_assets.downloads import wheel
from ml_assets.endpoints.gateway import keys
from ml_assets.endpoints.ledger import Ledger, Release
from ml_assets.settings import Settings
from ml_assets.spec import CustomizationSpec
from ml_assets.traffic.store import TrafficLog

NAME = "voice"
HOUSEHOLDS = 20
CLIENTS = 40
"""Requests under way at a time."""
SENSOR_SECONDS = "5"
LOOK_SECONDS, ACTION_SECONDS = 240, 900
"""How long a look, and what it decided, may take."""
POINT = 50
"""Requests of one point of the picture."""

OLD, NEW = "2023.9.22", "2026.10.27"


@dataclass(frozen=True)
class Phase:
    """A time in the product's life: what is said in it."""

    title: str
    release: str
    languages: dict[str, float]
    looks: int
    """Long enough for so many looks at the traffic."""


PHASES = (
    Phase("commands of 2023", OLD, {"en": 1.0}, 1),
    Phase("commands of 2026, German arrives", NEW, {"en": 0.85, "de": 0.15}, 3),
)


@dataclass
class Turn:
    """One request: who asked, what was right, and what was answered by which adapter."""

    phase: int
    row: dict[str, str]
    answer: str = ""
    adapter: str = ""
    right: bool = False


@dataclass
class Event:
    """Something that happened after so many requests."""

    after: int
    text: str
    kind: str


@dataclass
class History:
    turns: list[Turn] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def happened(self, kind: str, text: str) -> None:
        self.events.append(Event(len(self.turns), text, kind))


def main() -> int:
    os.environ[MODULE_VARIABLE] = "examples.home_commands.history.definitions"
    os.environ.setdefault("EVERGREEN_SENSOR_SECONDS", SENSOR_SECONDS)
    settings, show = Settings.from_env(), clock()
    return demonstrate(settings, lambda: _demonstration(settings, show))


def _demonstration(settings: Settings, show: Callable[[str], None]) -> None:
    check_new(settings)
    for release in dict.fromkeys(phase.release for phase in PHASES):
        wheel(f"home-assistant-intents=={release}", settings)
    with brought_up(settings, Path(__file__).parent, show) as (specs, _, urls):
        replay = Replay(settings, specs[0], urls["gateway"], show)
        history = replay.run()
        # not beside the comparison: two processes that compute with all cores take far longer together
        replay.wait_for_look()
        without = replay.without_maintenance(history)
        report(settings, history, without, urls, show)


def check_new(settings: Settings) -> None:
    """Raises OperationError when this was lived through before: the model would know what is to come."""
    settings.home.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(Ledger(settings.ledger_url)) as ledger:
        releases = len(ledger.history(NAME))
    with contextlib.closing(TrafficLog(settings.traffic_url)) as log:
        asked = NAME in log.heads()
    if releases > 1 or asked:
        raise OperationError(
            f"{settings.home} has a history of {NAME!r} already; remove that directory (after `make down "
            f"EVERGREEN_HOME={settings.home}`), or give another one: `make demo-drift DRIFT_HOME=…`"
        )


class Replay:
    """The households, and an observer who writes down what the system does by itself."""

    def __init__(
        self, settings: Settings, spec: CustomizationSpec, url: str, show: Callable[[str], None]
    ) -> None:
        self.settings, self.spec, self.url, self.show = settings, spec, url, show
        self.history = History()
        self.asked = 0
        """Requests that were sent, and that looks are to have seen."""
        self.seen: set[str] = set()

    def run(self) -> History:
        """Live through all phases."""
        self.keys = self._households()
        self.first = self._release()
        self.asked = self._looked()
        for number, phase in enumerate(PHASES):
            self.show(f"from now on: {phase.title}")
            self.history.happened("phase", phase.title)
            rows = self._rows(phase, phase.looks * self.spec.drift.every, seed=100 + number)
            for look in range(phase.looks):
                part = [next(rows) for _ in range(self.spec.drift.every)]
                turns = asyncio.run(self._talk(number, part))
                self.history.turns += turns
                self.show(f"{len(self.history.turns)} requests; right: {share(turns):.0%} of the last ones")
                self.asked += len(part)
                if (number + 1, look + 1) != (len(PHASES), phase.looks):  # nobody asks afterwards
                    self.wait_for_look()
                    self._wait_for_action()
        return self.history

    def _households(self) -> list[str]:
        with contextlib.closing(Ledger(self.settings.ledger_url)) as ledger:
            return [keys.create(ledger, [NAME], name=f"household {i + 1}")[0] for i in range(HOUSEHOLDS)]

    def _release(self) -> Release:
        with contextlib.closing(Ledger(self.settings.ledger_url)) as ledger:
            release = ledger.current(NAME)
        if release is None:
            raise OperationError(f"{NAME} is not served")
        return release

    def _rows(self, phase: Phase, count: int, seed: int) -> Iterator[dict[str, str]]:
        return iter(utterances(phase.release, count, seed, languages=phase.languages))

    async def _talk(self, phase: int, rows: Sequence[dict[str, str]]) -> list[Turn]:
        """Ask, and say what would have been right about seven of nine requests."""
        waiting = iter(enumerate(rows))
        turns = [Turn(phase, row) for row in rows]
        first = len(self.history.turns)
        async with httpx.AsyncClient(base_url=self.url, timeout=300, trust_env=False) as http:

            async def household() -> None:
                for i, row in waiting:
                    key = self.keys[(first + i) * 7 % HOUSEHOLDS]
                    body = {
                        "model": NAME,
                        "messages": [{"role": "user", "content": row["utterance"]}],
                        "metadata": {"language": row["language"]},
                    }
                    answer = await self._post(http, key, "/v1/chat/completions", body)
                    turn = turns[i]
                    turn.answer = answer["choices"][0]["message"]["content"]
                    turn.adapter = answer["system_fingerprint"]
                    turn.right = same_answer(row["call"], turn.answer)
                    if (first + i) % 9 > 1:
                        await self._post(
                            http, key, "/v1/feedback", {"id": answer["id"], "right_answer": row["call"]}
                        )

            await asyncio.gather(*(household() for _ in range(CLIENTS)))
        return turns

    async def _post(self, http: httpx.AsyncClient, key: str, path: str, body: Any) -> Any:
        patience = 60
        while True:
            response = await http.post(path, json=body, headers={"Authorization": f"Bearer {key}"})
            patience -= 1
            if response.status_code != 429 or not patience:
                break
            await asyncio.sleep(float(response.headers.get("retry-after", 1)))
        if response.status_code >= 400:
            raise OperationError(f"{path}: {response.status_code} {response.text[:300]}")
        return response.json()

    # -- what the system does --------------------------------------------------------------------------

    @contextlib.contextmanager
    def _book(self) -> Iterator[DecisionBook]:
        with contextlib.closing(Ledger(self.settings.ledger_url)) as ledger:
            yield DecisionBook(ledger)

    def _looked(self) -> int:
        with self._book() as book:
            note = book.notes(NAME).get(NAME, {}).get("look")
        return int(note.value["looked"]) if note else 0

    def wait_for_look(self) -> None:
        """Until the system has looked at what was asked so far; shows what it decides."""
        self._wait(LOOK_SECONDS, "the look at the traffic", lambda: self._looked() >= self.asked)
        self._tell()

    def _wait_for_action(self) -> None:
        def idle() -> bool:
            self._tell()
            with self._book() as book:
                newest = book.latest(NAME)
                return not newest or not newest[0].is_open

        self._wait(ACTION_SECONDS, "what was decided", idle)
        adapter = self._release().adapter_digest
        served = {turn.adapter for turn in self.history.turns} | {e.text for e in self.history.events}
        if adapter not in served:
            self.history.happened("promotion", adapter)
            self.show(f"promoted: adapter {adapter[:12]} serves from now on")

    def _tell(self) -> None:
        """Show decisions that are new."""
        with self._book() as book:
            found = book.latest(NAME, 20)
        for history in reversed(found):
            decision = history.decision
            state = f"{decision.id} {history.state} {history.verdict}"
            if state in self.seen:
                continue
            self.seen.add(state)
            verdict = f"; the gate says {history.verdict}" if history.verdict else ""
            self.show(f"    {decision.action} ({history.state}{verdict}): {decision.diagnosis}")
            if decision.action != "watch" and decision.id not in self.seen:
                self.seen.add(decision.id)
                self.history.happened("decision", decision.action)

    def _wait(self, seconds: float, what: str, ready: Callable[[], bool]) -> None:
        end = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > end:
                raise OperationError(f"{what} took more than {seconds:.0f} s; see the Dagster UI")
            time.sleep(1)

    # -- and what it would have been -------------------------------------------------------------------

    def without_maintenance(self, history: History) -> list[bool]:
        """Whether the first adapter answers right: the same requests to a system that nobody maintains."""
        from ml_assets.engine import hardware
        from ml_assets.engine.generation import generate
        from ml_assets.engine.loading import load_base
        from ml_assets.engine.prompting import render_messages

        late = [turn for turn in history.turns if turn.adapter != self.first.adapter_digest]
        rights = {id(turn): turn.right for turn in history.turns}
        if late:
            self.show(f"asking the first adapter the last {len(late)} requests, for comparison")
            store = ArtifactStore(self.settings.artifacts_url, self.settings.artifact_cache)
            hardware.prepare_process()
            directory = store.open(ArtifactRef("base_model", self.first.base_digest))
            base = load_base(directory, hardware.compute_dtype(self.settings.home))
            base.attach("first", store.open(ArtifactRef("adapter", self.first.adapter_digest)))
            prompts = [base.chat.prompt_ids(render_messages(self.spec.prompt, turn.row)) for turn in late]
            with hardware.computing(self.settings.home), base.active("first"):
                answers = generate(base, prompts, self.spec.endpoint.max_new_tokens)
            for turn, answer in zip(late, answers, strict=True):
                rights[id(turn)] = same_answer(turn.row["call"], answer.text)
        return [rights[id(turn)] for turn in history.turns]


def share(turns: Sequence[Turn]) -> float:
    return sum(turn.right for turn in turns) / max(1, len(turns))


def report(
    settings: Settings,
    history: History,
    without: Sequence[bool],
    urls: dict[str, str],
    show: Callable[[str], None],
) -> None:
    """Print the history and draw it."""
    turns = history.turns
    folder = settings.home / "demo-drift"
    folder.mkdir(parents=True, exist_ok=True)
    points = [(at, min(at + POINT, len(turns))) for at in range(0, len(turns), POINT)]
    maintained = [share(turns[a:b]) for a, b in points]
    alone = [sum(without[a:b]) / (b - a) for a, b in points]
    picture = draw(folder / "accuracy.png", points, maintained, alone, history.events)
    record = {
        "points": points,
        "with maintenance": maintained,
        "without": alone,
        "events": [vars(event) for event in history.events],
    }
    (folder / "history.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    print("\nRight answers (exact match), by requests:\n")
    print("| requests | with maintenance | without | what happened before |")
    print("| --- | ---: | ---: | --- |")
    for (a, b), kept, left in zip(points, maintained, alone, strict=True):
        happened = [describe(event) for event in history.events if a <= event.after < b]
        print(f"| {a + 1} to {b} | {kept:.0%} | {left:.0%} | {', '.join(happened)} |")
    newest = [
        (turn, ok) for turn, ok in zip(turns, without, strict=True) if turn.adapter == turns[-1].adapter
    ]
    print("\nThe adapter that serves now, on the requests that it answered, and the first one on the same:")
    for language in sorted({turn.row["language"] for turn, _ in newest}):
        some = [(turn.right, ok) for turn, ok in newest if turn.row["language"] == language]
        now, first = (sum(one[i] for one in some) / len(some) for i in (0, 1))
        before = [turn for turn in turns if turn.phase == 0 and turn.row["language"] == language]
        was = f"; {share(before):.0%} of {len(before)} before the change" if before else ""
        print(f"  {language}: {now:.0%} against {first:.0%} of {len(some)}{was}")
    print(f"\nPicture: {picture}")
    print(f"Decisions: {urls['dagster']}/assets/{NAME}/decision")
    print_urls(urls)
    print(f"\n`make down EVERGREEN_HOME={settings.home}` ends it.")
    show("done")


def describe(event: Event) -> str:
    if event.kind == "promotion":
        return f"adapter {event.text[:8]} promoted"
    return event.text.replace("_", " ")


if __name__ == "__main__":
    sys.exit(main())
