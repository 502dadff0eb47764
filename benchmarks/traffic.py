"""What logging adds to a request: the same gateway, asked with a key that is logged and with one that is not.

    python -m benchmarks.traffic --quick

A real gateway program over a tiny random model, so that the model hides as little as possible; blocks of
requests over HTTP alternate between the two keys. Then the writer alone: records that it redacts and stores
in a second.
"""

import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import httpx
import psutil

from benchmarks.common import ROOT, Unavailable, number, options, parser, print_json, say, start, table
from benchmarks.deployment import STATE
from benchmarks.load import percentile
from ml_assets.endpoints.gateway import keys
from ml_assets.traffic.records import TrafficRecord
from ml_assets.traffic.store import TrafficLog
from ml_assets.traffic.writer import TrafficWriter

CLIENTS = 4
BLOCK = 400
"""Requests of one block."""
PAUSE = 0.2
"""Seconds between two blocks, so that none pays for what the one before left to write."""


def main() -> None:
    arguments = parser(str(__doc__).split("\n\n")[0])
    arguments.add_argument("--blocks", type=int, help="of each kind; default 40, with --quick 10")
    arguments.add_argument("--database", help="SQLAlchemy URL; default: SQLite in a temporary folder")
    parsed = arguments.parse_args()
    given = options(parsed)
    blocks = parsed.blocks or (10 if given.quick else 40)
    with tempfile.TemporaryDirectory() as folder:
        measured, cpu = _requests(Path(folder), blocks, parsed.database)
        rate = _records_per_second(parsed.database or f"sqlite:///{folder}/alone.db")
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    rows = {
        name: {share: [1000 * percentile(block, at) for block in found] for share, at in shares.items()}
        for name, found in measured.items()
    }
    # block by block, so that a slow moment of the machine meets both
    added = {
        share: [a - b for a, b in zip(rows["logged"][share], rows["not logged"][share], strict=True)]
        for share in shares
    }
    more = median(a - b for a, b in zip(cpu["logged"], cpu["not logged"], strict=True))
    lines = [
        [name, *(number(median(row[s]), 3) for s in shares), number(median(cpu[name]), 3)]
        for name, row in rows.items()
    ]
    lines.append(["added", *(number(median(added[s]), 3) for s in shares), number(more, 3)])
    title = f"{blocks} blocks of {BLOCK} requests each, {CLIENTS} clients, ms: medians over the blocks"
    print(table(title, ["", *shares, "processor"], lines))
    print(f"\nThe writer alone stores {rate:,.0f} records a second.")
    print_json(
        {
            "added_p99_ms": round(median(added["p99"]), 3),
            "added_p50_ms": round(median(added["p50"]), 3),
            "added_processor_ms": round(more, 3),
            "records_per_second": round(rate),
        }
    )


def _requests(
    folder: Path, blocks: int, database: str | None
) -> tuple[dict[str, list[list[float]]], dict[str, list[float]]]:
    """By block, with a key that is logged and with one that is not: seconds of each request, and milliseconds
    of processor time that the gateway took for one, writing included."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "endpoints")]
    from gateway_world import QUESTION, World, running_server  # pyright: ignore[reportMissingImports]

    for name in STATE:  # the gateway's only
        os.environ.pop(name, None)
    if database:
        os.environ["EVERGREEN_TRAFFIC_URL"] = database
    world = World(folder)
    world.record(world.adapter("home", 1))
    both = {
        "logged": keys.create(world.ledger, ["*"])[0],
        "not logged": keys.create(world.ledger, ["*"], unlogged=True)[0],
    }
    times: dict[str, list[list[float]]] = {name: [] for name in both}
    cpu: dict[str, list[float]] = {name: [] for name in both}
    body = {"model": "home", "messages": QUESTION, "max_tokens": 1, "metadata": {"language": "en"}}
    with running_server(world) as server:
        say("the gateway answers")
        process = psutil.Process(server.process.pid)
        for number_of_block in range(blocks + 1):
            # the one that comes second meets a warmer process: take turns
            for name in list(both)[:: 1 if number_of_block % 2 else -1]:
                before = sum(process.cpu_times()[:2])
                found = _block(server.url, both[name], body)
                if number_of_block:  # the first block warms up
                    times[name].append(found)
                time.sleep(PAUSE)
                if number_of_block:
                    cpu[name].append(1000 * (sum(process.cpu_times()[:2]) - before) / len(found))
        server.stop()
    return times, cpu


def _block(url: str, key: str, body: dict[str, object]) -> list[float]:
    def client(_: int) -> list[float]:
        times: list[float] = []
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, trust_env=False) as http:
            http.get("/v1/models").raise_for_status()  # connect
            for _ in range(BLOCK // CLIENTS):
                began = time.perf_counter()
                http.post("/v1/chat/completions", json=body).raise_for_status()
                times.append(time.perf_counter() - began)
        return times

    with ThreadPoolExecutor(CLIENTS) as pool:
        try:
            return [seconds for times in pool.map(client, range(CLIENTS)) for seconds in times]
        except httpx.HTTPError as error:
            raise Unavailable(f"the gateway does not answer: {error}") from error


def _records_per_second(url: str, count: int = 20_000) -> float:
    writer = TrafficWriter(url, bound=count)
    writer.start()
    began = time.perf_counter()
    for n in range(count):
        writer.put(
            TrafficRecord(
                id=f"benchmark-{time.time_ns()}-{n}",
                at="2026-01-01T00:00:00.000000+00:00",
                customization="benchmark",
                key_id="00000000",
                adapter_digest="a" * 64,
                base_revision="tiny@000000000000",
                messages=[
                    {"role": "user", "content": f"turn on the light in room {n}, then call 030 1234567"}
                ],
                answer='{"intent": "HassTurnOn", "slots": {"area": "kitchen"}}',
                status=200,
                finish_reason="stop",
                prompt_tokens=20,
                completion_tokens=12,
                latency_ms=100.0,
                first_token_ms=50.0,
                mean_logprob=-0.1,
            )
        )
    if not writer.flush(600):
        raise RuntimeError("the writer did not store all records within 10 minutes")
    seconds = time.perf_counter() - began
    writer.close()
    log = TrafficLog(url)
    log.purge("benchmark", "2027")
    log.close()
    return count / seconds


if __name__ == "__main__":
    start(main)
