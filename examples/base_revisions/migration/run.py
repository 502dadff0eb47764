"""A new revision of a base model arrives: `make demo-migration`.

Two customizations serve on SmolLM2. Then a minor revision of it is published in the directory that they
follow, and nobody touches anything: a sensor adds the partition and has the base probed, shows the plan,
starts one backfill that carries the adapters over by the port ladder, the gate judges, and the endpoints
move. At the end stands what it saved, and the migration page.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dagster import AssetKey, DagsterInstance

from examples.base_revisions.revisions import make, publish, published
from examples.demonstration import demonstrate
from ml_assets.adapters.rungs import Climb
from ml_assets.artifacts import ArtifactError, ArtifactRef, ArtifactStore, read_json
from ml_assets.cli.demo import brought_up, clock
from ml_assets.cli.supervisor import MODULE_VARIABLE, OperationError, check_ports, is_running, print_urls
from ml_assets.decisions.book import DecisionBook, History
from ml_assets.endpoints.ledger import Ledger, Release
from ml_assets.settings import Settings
from ml_assets.spec import CustomizationSpec

FAMILY = "smollm2-135m-instruct"
FOLLOWED = "EVERGREEN_FOLLOWED_BASE"
PAGE = AssetKey(["fleet", "migration_plan"])
SENSOR_SECONDS = "5"
MIGRATION_SECONDS = 3600
PAGE_SECONDS = 180
"""How long the migration, and the page after it, may take."""
STOPPED = ("failed", "gave_up", "canceled", "dropped", "blocked_by_budget")
"""States of a customization's newest decision after which it is not migrated."""


@dataclass
class Moved:
    """One customization before and after."""

    name: str
    before: Release
    after: Release
    seconds: float
    """From the publication to the release on the new revision."""
    quality: dict[str, float | None] = field(default_factory=dict)
    """`before` (the champion on its own base), `after`, `bare`: means of the deciding metric."""
    climb: Climb | None = None


def main() -> int:
    settings, show = Settings.from_env(), clock()
    followed = settings.home / "followed" / FAMILY
    os.environ[MODULE_VARIABLE] = "examples.base_revisions.migration.definitions"
    os.environ[FOLLOWED] = str(followed)
    os.environ.setdefault("EVERGREEN_SENSOR_SECONDS", SENSOR_SECONDS)
    return demonstrate(settings, lambda: _demonstration(settings, followed, show))


def _demonstration(settings: Settings, followed: Path, show: Callable[[str], None]) -> None:
    earlier = published(followed)
    if earlier is not None and not earlier.startswith("original-"):
        # publishing the base once more would be news as well: everything would move back to it
        print(already_moved(settings))
        return
    if not is_running(settings):
        check_ports(settings)
    show("making the base and a minor revision of it (the first time, minutes)")
    original = make("original", settings, log=show)
    minor = make("minor", settings, log=lambda line: show(f"    {line}"))
    publish(original, followed)
    with brought_up(settings, Path(__file__).parent, show) as (specs, instance, urls):
        migration = Migration(settings, specs, show)
        show("publishing the minor revision in the directory that is followed")
        publish(minor, followed)
        moved = migration.watch()
        page = migration.page(instance)
        report(moved, page, urls, show)
        print(f"\n`make down EVERGREEN_HOME={settings.home}` ends it.")


def already_moved(settings: Settings) -> str:
    """What is served in a home where a newer revision was published before, and how to begin anew."""
    with contextlib.closing(Ledger(settings.ledger_url)) as ledger:
        serving = ledger.current_all()
    lines = [f"{name} is served on {release.base_revision}" for name, release in sorted(serving.items())]
    return "\n".join(
        [
            f"A newer revision was published in {settings.home} before:",
            *(f"  {line}" for line in lines or ["nothing is served"]),
            f"`make up EVERGREEN_HOME={settings.home}` goes on with it. To begin anew, give another",
            "directory (`make demo-migration MIGRATION_HOME=…`), or run",
            f"`make down EVERGREEN_HOME={settings.home}` and remove that one.",
        ]
    )


class Migration:
    """An observer, who writes down what the system does by itself."""

    def __init__(
        self, settings: Settings, specs: Sequence[CustomizationSpec], show: Callable[[str], None]
    ) -> None:
        self.settings, self.specs, self.show = settings, specs, show
        self.before = self._serving()
        self.began = time.monotonic()
        self.moved_at = 0.0
        self.seen: set[str] = set()
        self.stay: set[str] = set()
        """Those whose candidates the gate did not accept."""
        with self._book() as book:
            self.earlier = {history.decision.id for history in book.migrations()}
            self.earlier |= {climb.climb for climb in book.climbs()}

    def watch(self) -> list[Moved]:
        """Wait until every endpoint answers on the new revision, or stays because the gate says so; show what
        happens meanwhile.

        Raises OperationError when something stopped before, or takes too long.
        """
        moved: dict[str, Moved] = {}
        while len(moved) + len(self.stay) < len(self.specs):
            for name, release in self._serving().items():
                if name not in moved and release.base_revision != self.before[name].base_revision:
                    seconds = time.monotonic() - self.began
                    moved[name] = Moved(name, self.before[name], release, seconds)
                    self.show(f"{name} is served on {release.base_revision}")
            stopped = self._tell()
            if stopped and len(moved) + len(self.stay) < len(self.specs):
                raise OperationError(f"not everything moved: {stopped}; see the Dagster UI")
            if time.monotonic() - self.began > MIGRATION_SECONDS:
                raise OperationError(
                    f"the migration takes more than {MIGRATION_SECONDS} s; see the Dagster UI"
                )
            time.sleep(1)
        self.moved_at = time.time()
        store = ArtifactStore(self.settings.artifacts_url, self.settings.artifact_cache)
        with self._book() as book:
            climbs = {climb.customization: climb for climb in self._new_climbs(book)}
        for one in moved.values():
            one.climb = climbs.get(one.name)
            one.quality = quality(store, one.after.report_digest)
        return [moved[spec.name] for spec in self.specs if spec.name in moved]

    def page(self, instance: DagsterInstance) -> str:
        """Where the page of the plan lies, once it was made for what is served now. Empty when it was not."""
        end, path = time.monotonic() + PAGE_SECONDS, ""
        while time.monotonic() < end:
            record = instance.fetch_materializations(PAGE, limit=1).records
            if record and record[0].asset_materialization and record[0].timestamp > self.moved_at:
                entry = record[0].asset_materialization.metadata.get("page")
                if entry is not None:
                    path = str(entry.value)
                    break
            time.sleep(1)
        return path

    def _serving(self) -> dict[str, Release]:
        with contextlib.closing(Ledger(self.settings.ledger_url)) as ledger:
            found = {spec.name: ledger.current(spec.name) for spec in self.specs}
        for name, release in found.items():
            if release is None:
                raise OperationError(f"{name} is not served")
        return {name: release for name, release in found.items() if release is not None}

    @contextlib.contextmanager
    def _book(self) -> Iterator[DecisionBook]:
        with contextlib.closing(Ledger(self.settings.ledger_url)) as ledger:
            yield DecisionBook(ledger)

    def _new_climbs(self, book: DecisionBook) -> list[Climb]:
        """Oldest first."""
        return [climb for climb in book.climbs() if climb.climb not in self.earlier]

    def _tell(self) -> str | None:
        """Show what is new in the book; what stopped a migration, if something did."""
        with self._book() as book:
            histories = [h for h in reversed(book.migrations()) if h.decision.id not in self.earlier]
            climbs = self._new_climbs(book)
        for climb in climbs:
            if climb.climb not in self.seen:
                self.seen.add(climb.climb)
                for rung in climb.rungs:
                    self.show(f"    {climb.customization}, {rung.rung}: {rung.verdict}: {rung.reason[:160]}")
        for history in histories:
            state = f"{history.decision.id} {history.state}"
            if state not in self.seen:
                self.seen.add(state)
                seconds = history.decision.device_seconds
                predicted = "" if seconds is None else f", predicted {seconds:.0f} device seconds"
                name = history.decision.customization
                self.show(f"    migrate {name}: {history.state}{predicted}")
                if history.end and history.verdict in ("reject", "undecided"):
                    self.stay.add(name)
                    self.show(f"{name} stays where it is: the gate says {history.verdict}")
        # the next attempt is recorded together with the failure of the one before
        newest: dict[str, History] = {history.decision.customization: history for history in histories}
        return "; ".join(f"{name} {h.state}" for name, h in newest.items() if h.state in STOPPED) or None


def quality(store: ArtifactStore, report_digest: str) -> dict[str, float | None]:
    """Means of the deciding metric in a report: the champion on its own base, what replaced it, and the
    better of the new base's own arms. None where the report has no such arm; empty when it is gone."""
    try:
        summary = read_json(store.open(ArtifactRef("eval_report", report_digest)) / "summary.json")
    except ArtifactError:
        return {}
    arms, metric = summary["arms"], summary["metric"]

    def mean(name: str) -> float | None:
        entry = arms[name]["metrics"][metric] if name in arms else None
        return entry["mean"] if entry else None

    bare = [value for name in ("zero_shot", "few_shot") if (value := mean(name)) is not None]
    return {"before": mean("champion"), "after": mean("adapter"), "bare": max(bare, default=None)}


def report(moved: Sequence[Moved], page: str, urls: dict[str, str], show: Callable[[str], None]) -> None:
    """Print what was carried over, how, and what it saved."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    print("\nFrom the publication of the revision, with nobody touching anything:\n")
    header = [
        "customization",
        "rung",
        "before",
        "after",
        "bare base",
        "seconds",
        "in full",
        "S",
        "served after",
    ]
    print(f"| {' | '.join(header)} |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for one in moved:
        climb = one.climb
        accepted = climb.accepted if climb else None
        full = climb.full_seconds if climb else None
        cells = [
            one.name,
            accepted.rung if accepted else "-",
            *(share(one.quality.get(name)) for name in ("before", "after", "bare")),
            f"{climb.seconds:.0f}" if climb else "-",
            f"{full:.0f}" if full else "-",
            "-" if climb is None or climb.saved is None else f"{climb.saved:.2f}",
            f"{one.seconds:.0f} s",
        ]
        print(f"| {' | '.join(cells)} |")
    spent = sum(one.climb.seconds for one in moved if one.climb)
    full = sum(one.climb.full_seconds or 0.0 for one in moved if one.climb)
    if full:
        print(f"\nS = 1 - {spent:.0f} / {full:.0f} = {1 - spent / full:.2f}")
    print(f"\nMigration page: {page or 'not made yet'}")
    print(f"In the Dagster UI: {urls['dagster']}/assets/{'/'.join(PAGE.path)}")
    print(f"Its backfill: {urls['dagster']}/runs?view=backfills")
    print_urls(urls)
    show("done")


if __name__ == "__main__":
    sys.exit(main())
