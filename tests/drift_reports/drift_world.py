"""A customization that serves, as artifacts: dataset, adapter, the report that made it champion; and its
users."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from customizations import colour_rows

from ml_assets.artifacts import ArtifactRef, ArtifactStore, canonical_json, sha256_bytes
from ml_assets.datasets.snapshot import Snapshot, write_snapshot
from ml_assets.drift_reports.reference import Champion
from ml_assets.spec import CustomizationSpec
from ml_assets.traffic.records import TrafficRecord

START = datetime(2026, 3, 1, tzinfo=UTC)
ROWS = 1200
FROZEN = 240


def specification(task: str = "classification", **blocks: Any) -> CustomizationSpec:
    target = "{colour}" if task == "classification" else '{{"colour":"{colour}"}}'
    return CustomizationSpec.model_validate(
        {
            "name": "colours",
            "source": {"kind": "jsonl", "path": "rows.jsonl"},
            "prompt": {
                "user": "{text}",
                "target": target,
            },
            "base_models": ["tiny"],
            "evaluation": {"task": task, "value": {"right": 0.02, "wrong": -0.05, "refusal": "^I can't"}},
            "drift": {"embedding": "hashing", "one_false_alarm_in": "365d"},
        }
        | blocks
    )


class World:
    """Artifacts in a store below `home`. The champion is right on all but every twentieth frozen row. What is
    asked ends with `ending`."""

    def __init__(
        self,
        home: Path,
        spec: CustomizationSpec | None = None,
        base: ArtifactRef | None = None,
        ending: str = "",
    ):
        self.home = home
        self.spec = spec or specification()
        self.store = ArtifactStore(str(home / "artifacts"))
        every = [
            row | {"text": row["text"] + ending, "_row": sha256_bytes(row["text"].encode())}
            for row in colour_rows(3000)
        ]
        known, self.future = every[:ROWS], every[ROWS:]
        split = [row | {"_split": "evaluation" if i < FROZEN else "train"} for i, row in enumerate(known)]
        train, frozen = ([r for r in split if r["_split"] == side] for side in ("train", "evaluation"))
        with self.store.staging("dataset") as directory:
            write_snapshot(Snapshot(train, frozen, ["text", "colour"], {}, {}), directory, {})
            self.dataset = self.store.publish_directory("dataset", directory)
        manifest = {"dataset": self.dataset.digest, "prompt": self.spec.prompt.model_dump()}
        self.adapter = self.store.publish("adapter", {"manifest.json": canonical_json(manifest)})
        lines = [self._line(row, i % 20 == 0) for i, row in enumerate(frozen)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        self.report = self.store.publish("eval_report", {"rows.jsonl": text.encode()})
        self.champion = Champion(
            self.adapter.digest, base.digest if base else "b" * 64, "tiny@1", self.report.digest, since=1
        )

    def answer(self, colour: str) -> str:
        return self.spec.prompt.target.format_map({"colour": colour})

    def _line(self, row: dict[str, str], wrong: bool) -> dict[str, Any]:
        answer = self.answer("white" if wrong and row["colour"] != "white" else row["colour"])
        return {
            "row": row["_row"],
            "arm": "adapter",
            "prompt": self.spec.prompt.user.format_map(row),
            "expected": self.answer(row["colour"]),
            "answer": answer,
            "right": answer == self.answer(row["colour"]),
            "refused": False,
            "sampled": True,
            "prompt_tokens": 12,
            "answer_tokens": 1,
            "finished": True,
        }

    def record(self, number: int, text: str, answer: str, **changes: Any) -> TrafficRecord:
        record = TrafficRecord(
            id=f"chatcmpl-{number}",
            at=(START + timedelta(seconds=60 * number)).isoformat(timespec="microseconds"),
            customization=self.spec.name,
            key_id="key1",
            adapter_digest=self.champion.adapter_digest,
            base_revision="tiny@1",
            messages=[{"role": "user", "content": text}],
            answer=answer,
            status=200,
            finish_reason="stop",
            prompt_tokens=12,
            completion_tokens=1,
            latency_ms=5.0,
            first_token_ms=None,
            mean_logprob=-0.05,
        )
        return replace(record, **changes)

    def quiet(self, count: int, first: int = 0) -> list[TrafficRecord]:
        """Requests like the dataset's rows, answered right but for every twentieth."""
        rows = self.future[first : first + count]
        assert len(rows) == count
        return [
            self.record(first + i, row["text"], self.answer("white" if i % 20 == 7 else row["colour"]))
            for i, row in enumerate(rows)
        ]

    def moved(self, count: int, first: int, seed: int = 0) -> list[TrafficRecord]:
        """Requests for something else, in other words; what is answered can't be right."""
        drawn = random.Random(seed)
        verbs, things = (
            ["please switch off", "could you start", "turn up"],
            ["heater", "radio", "fan", "oven"],
        )
        return [
            self.record(
                first + i,
                f"{drawn.choice(verbs)} every {drawn.choice(things)} upstairs at {drawn.randrange(10_000)}",
                self.answer("black"),
            )
            for i in range(count)
        ]


def numbered(records: Sequence[TrafficRecord]) -> list[TrafficRecord]:
    """As the database would number them."""
    return [replace(record, seq=i + 1) for i, record in enumerate(records)]
