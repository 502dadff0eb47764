"""Garbage collection of artifacts: what nothing names any more, and was not used for long, goes.

Roots are what aliases, partitions (the newest reference of each asset), releases inside their retention, open
decisions and climbs inside the retention name. Whatever an artifact names in its JSON files, by digest or as
a base revision, stays with it: an adapter keeps its dataset, its base and its parent, a report its adapter.
Memos go with the artifact that they name.
"""

import datetime
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from ml_assets.adapters.rungs import Climb
from ml_assets.artifacts import ArtifactRef, ArtifactStore, Memo, Stored
from ml_assets.decisions.book import DecisionBook, History
from ml_assets.decisions.diagnosis import duration
from ml_assets.endpoints.ledger import Ledger, Release
from ml_assets.spec import CustomizationSpec, MigrationSpec

UNUSED_DAYS = 30
"""Artifacts that nothing names stay that long after their last use: a cache of answers, or the adapter of a
run that is about to be found again."""
DEFAULT_RETENTION = str(MigrationSpec().retention)
"""Of customizations that are not declared any more."""
DIGEST = re.compile(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")
REVISION = re.compile(rb"[a-z0-9][a-z0-9._-]*@[0-9a-f]{12}(?![0-9a-f])")


@dataclass(frozen=True)
class Sweep:
    """What goes, and for each artifact that stays the reason."""

    gone: tuple[Stored, ...]
    kept: Mapping[ArtifactRef, str]
    memos: tuple[Memo, ...]
    """They name what goes."""

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in self.gone)


def sweep(
    artifacts: Sequence[Stored],
    memos: Sequence[Memo],
    roots: Mapping[str, str],
    names: Callable[[Stored], Iterable[str]],
    now: datetime.datetime,
    unused: datetime.timedelta = datetime.timedelta(days=UNUSED_DAYS),
) -> Sweep:
    """Divide the artifacts. `roots`: {digest: who names it}; `names(artifact)`: digests that it names, itself
    and strangers allowed."""
    by_digest: dict[str, list[Stored]] = {}
    for one in artifacts:
        by_digest.setdefault(one.ref.digest, []).append(one)
    used = {one.ref: one.published_at for one in artifacts}
    for memo in memos:
        if memo.ref in used:
            used[memo.ref] = max(used[memo.ref], memo.used_at)
    kept: dict[ArtifactRef, str] = {}
    pending = [(digest, why) for digest, why in sorted(roots.items()) if digest in by_digest]
    # what is young may be about to be named, and what it rests on is needed then
    pending += [
        (one.ref.digest, f"used {used[one.ref]:%Y-%m-%d}")
        for one in artifacts
        if now - used[one.ref] < unused
    ]
    while pending:
        digest, why = pending.pop(0)
        for one in by_digest.get(digest, ()):
            if one.ref not in kept:
                kept[one.ref] = why
                pending += [(name, f"named by {one.ref}") for name in sorted(set(names(one)))]
    gone = [one for one in artifacts if one.ref not in kept]
    lost = {one.ref for one in gone}
    return Sweep(tuple(gone), kept, tuple(memo for memo in memos if memo.ref in lost))


def find_names(
    store: ArtifactStore, artifacts: Sequence[Stored]
) -> tuple[dict[ArtifactRef, set[str]], set[ArtifactRef]]:
    """What each artifact names: every digest in its JSON files, and the base models of the base revisions in
    them. What was written by another release is found as well. And those that are damaged: a file is
    missing, or a base model does not say which revision it is."""
    texts: dict[ArtifactRef, dict[str, bytes]] = {}
    damaged: set[ArtifactRef] = set()
    bases: dict[bytes, set[str]] = {}
    for one in artifacts:
        texts[one.ref] = {}
        for name in one.files:
            if name.endswith(".json"):
                try:
                    texts[one.ref][name] = store.content(one.ref, name)
                except FileNotFoundError:  # any other error says nothing about the artifact
                    damaged.add(one.ref)
        if one.ref.kind == "base_model" and "manifest.json" in texts[one.ref]:
            try:
                revision = json.loads(texts[one.ref]["manifest.json"]).get("revision", "")
                bases.setdefault(str(revision).encode(), set()).add(one.ref.digest)
            except (ValueError, AttributeError):
                damaged.add(one.ref)
    names = {
        ref: {found.decode() for text in some.values() for found in DIGEST.findall(text)}
        | {
            digest
            for text in some.values()
            for found in REVISION.findall(text)
            for digest in bases.get(found, ())
        }
        for ref, some in texts.items()
    }
    return names, damaged


# -- roots ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Note:
    """The newest reference of an asset (and partition), in the file `path`."""

    path: Path
    digest: str
    asset: str
    partition: str | None


def read_notes(refs: Path) -> list[Note]:
    """Raises ValueError that names a note which can't be read: what it protects is not known."""
    found = []
    for path in sorted(refs.rglob("*.json")):
        try:
            digest = str(json.loads(path.read_bytes())["digest"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected a reference to an artifact ({error})") from error
        asset = "/".join(unquote(part) for part in path.parent.relative_to(refs).parts)
        partition = None if path.stem == "@unpartitioned" else unquote(path.stem)
        found.append(Note(path, digest, asset, partition))
    return found


def partition_roots(notes: Iterable[Note], revisions: Collection[str]) -> dict[str, str]:
    """What the newest materialization of each asset (and partition) gave. Partitions that were deleted name
    nothing."""
    found: dict[str, str] = {}
    for note in notes:
        if note.partition is None:
            found.setdefault(note.digest, f"newest of {note.asset}")
        elif note.partition in revisions:
            found.setdefault(note.digest, f"newest of {note.asset}, partition {note.partition}")
    return found


def retired(
    revisions: Sequence[str],
    current: Mapping[str, str],
    releases: Iterable[Sequence[Release]],
    retention_of: Callable[[str], str],
    in_use: Collection[str],
    notes: Iterable[Note],
    now: datetime.datetime,
) -> list[str]:
    """The base revisions (partitions, oldest first) that can go: the source of their family holds another one
    (`current`: {family: revision}; else the last partition), no release names them inside its retention, they
    are not `in_use` (aliases, open decisions), and what was made for them is older than the longest
    retention."""
    named, longest = set(in_use), duration(DEFAULT_RETENTION)
    for rows in releases:
        if rows:
            retention = retention_of(rows[0].customization)
            longest = max(longest, duration(retention))
            kept = release_roots(rows, retention, now)
            named |= {row.base_revision for row in rows if row.base_digest in kept}
    held = {revision.rpartition("@")[0]: revision for revision in revisions}
    held |= {family: revision for family, revision in current.items() if revision in revisions}
    young = {
        note.partition
        for note in notes
        if note.partition and now.timestamp() - note.path.stat().st_mtime < longest.total_seconds()
    }
    return [one for one in revisions if one not in named and one not in held.values() and one not in young]


def release_roots(releases: Sequence[Release], retention: str, now: datetime.datetime) -> dict[str, str]:
    """What the releases of one customization (newest first) name: the newest, and those that served within
    the retention, so that they can be served again."""
    found: dict[str, str] = {}
    until: datetime.datetime | None = None
    for release in releases:
        serves = until is None and release.action != "withdraw"
        ended = until or datetime.datetime.fromisoformat(release.at)
        if serves or now - ended < duration(retention):
            why = f"{release.customization} serves it" if serves else "it served: inside the retention"
            for digest in (release.adapter_digest, release.base_digest, release.report_digest):
                found.setdefault(digest, why if serves else f"{release.customization}: {why}")
        until = datetime.datetime.fromisoformat(release.at)
    return found


def decision_roots(histories: Iterable[History]) -> dict[str, str]:
    """What decisions that are open are about."""
    return {
        digest: f"decision {history.decision.id} about {history.decision.customization} is open"
        for history in histories
        if history.is_open
        for digest in (history.decision.adapter_digest, history.decision.dataset_digest)
        if digest
    }


def climb_roots(climbs: Iterable[Climb], retention: str, now: datetime.datetime) -> dict[str, str]:
    """What the rungs of climbs inside the retention gave: the evidence for what was accepted and what not."""
    found: dict[str, str] = {}
    for climb in climbs:
        if now - datetime.datetime.fromisoformat(climb.at) < duration(retention):
            digests = [climb.champion_digest, climb.dataset_digest]
            digests += [d for rung in climb.rungs for d in (rung.adapter_digest, rung.report_digest) if d]
            for digest in digests:
                found.setdefault(digest, f"climb of {climb.customization} to {climb.base_revision}")
    return found


# -- doing it ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aliased:
    """A version that an alias points at."""

    alias: str
    customization: str
    adapter_digest: str
    report_digest: str | None
    base_revision: str


@dataclass(frozen=True)
class Garbage:
    """A sweep, the base revisions that it retires, and the notes that go with them."""

    sweep: Sweep
    retired: tuple[str, ...]
    notes: tuple[Note, ...]


def find_garbage(
    store: ArtifactStore,
    refs: Path,
    revisions: Sequence[str],
    ledger: Ledger,
    aliases: Iterable[Aliased],
    specs: Iterable[CustomizationSpec],
    now: datetime.datetime,
    unused: datetime.timedelta = datetime.timedelta(days=UNUSED_DAYS),
    retire: bool = False,
) -> Garbage:
    """What can go, read from the store, the notes, the ledger and its book; nothing is changed. `revisions`:
    the partitions, oldest first. `retire`: base revisions past their retention go too, with what was made
    for them."""
    book, retention = DecisionBook(ledger), {spec.name: spec.migration.retention for spec in specs}
    notes, aliases, climbs = read_notes(refs), list(aliases), book.climbs()
    # before the roots: what is published from here on is not in the list, so it stays
    artifacts, memos = list(store.stored()), list(store.memos())
    releases = [ledger.history(name) for name in ledger.newest_all()]
    histories = book.open()
    old: list[str] = []
    if retire:
        in_use = {alias.base_revision for alias in aliases}
        in_use |= {str(h.decision.base_revision) for h in histories}
        current = {
            name.removeprefix("base:"): str(subjects["current"].value["revision"])
            for name, subjects in book.notes().items()
            if name.startswith("base:") and "current" in subjects
        }

        def retention_of(name: str) -> str:
            return retention.get(name, DEFAULT_RETENTION)

        old = retired(revisions, current, releases, retention_of, in_use, notes, now)
    roots = partition_roots(notes, set(revisions) - set(old))
    for rows in releases:
        for digest, why in release_roots(
            rows, retention.get(rows[0].customization, DEFAULT_RETENTION), now
        ).items():
            roots.setdefault(digest, why)
    for alias in aliases:
        for digest in (alias.adapter_digest, alias.report_digest):
            if digest:
                roots.setdefault(digest, f"{alias.alias} of {alias.customization}")
    longest = max([*retention.values(), DEFAULT_RETENTION], key=duration)
    for digest, why in (decision_roots(histories) | climb_roots(climbs, longest, now)).items():
        roots.setdefault(digest, why)
    names, damaged = find_names(store, artifacts)
    for ref in damaged:
        roots.setdefault(ref.digest, "it is damaged")
    found = sweep(artifacts, memos, roots, lambda one: names[one.ref], now, unused)
    gone = tuple(note for note in notes if note.partition is not None and note.partition in old)
    return Garbage(found, tuple(old), gone)


def remove(
    store: ArtifactStore,
    found: Sweep,
    unused: datetime.timedelta,
    blocking: Callable[[], Sequence[str]],
) -> tuple[list[Stored], Sequence[str]]:
    """Remove what goes, its memos first. Gives back what was removed, and the runs that ended it early
    (`blocking`, asked before each: a run may find what is about to go). An artifact that was published or
    found again since is left."""
    memos: dict[ArtifactRef, list[Memo]] = {}
    for memo in found.memos:
        memos.setdefault(memo.ref, []).append(memo)
    since = datetime.datetime.now(datetime.UTC) - unused
    removed: list[Stored] = []
    for one in found.gone:
        if runs := blocking():
            return removed, runs
        own, current = memos.get(one.ref, []), store.look(one.ref)
        if current is None:
            continue
        uses = [store.used_at(memo.kind, memo.input_key) for memo in own]
        if max([current.published_at, *(at for at in uses if at)]) > since:
            continue
        for memo in own:
            store.forget(memo.kind, memo.input_key)
        store.delete(one.ref)
        removed.append(one)
    return removed, ()


def collect(
    store: ArtifactStore,
    garbage: Garbage,
    unused: datetime.timedelta,
    blocking: Callable[[], Sequence[str]],
    delete_partition: Callable[[str], None],
) -> str:
    """Remove what `find_garbage` found; what was done, in a sentence. Nothing is removed while there are
    `blocking` runs, those under way and those that did something since the search began: what they have found
    is not in it."""
    if runs := blocking():
        return f"nothing is removed {because_of(runs)}"
    # an interrupted collection has removed names of what it did not reach, which is found the next time
    for note in garbage.notes:
        note.path.unlink(missing_ok=True)
    for revision in garbage.retired:
        delete_partition(revision)
    removed, runs = remove(store, garbage.sweep, unused, blocking)
    told = f"removed {len(removed)} artifacts, {_size(sum(one.bytes for one in removed))}"
    return f"{told}; the rest stays {because_of(runs)}" if runs else told


def because_of(runs: Sequence[str]) -> str:
    """Why nothing is removed now."""
    return f"while runs are under way or have just ended: {', '.join(runs)}"


def describe(garbage: Garbage) -> list[str]:
    """What goes with sizes, and why the rest stays, in lines."""
    found = garbage.sweep
    lines = [f"{'':>10}  base revision {name}: its retention ended" for name in garbage.retired]
    lines += [f"{_size(one.bytes):>10}  {one.ref.kind} {one.ref.digest}" for one in found.gone]
    lines.append(f"{_size(found.bytes):>10}  in {len(found.gone)} artifacts and {len(found.memos)} memos go")
    lines += [
        f"     stays  {ref.kind} {ref.digest[:12]}: {why}" for ref, why in sorted(found.kept.items(), key=str)
    ]
    return lines


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
