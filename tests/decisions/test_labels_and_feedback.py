"""Files that people fill in, and feedback that people should look at."""

import json
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from ml_assets.cli.main import main
from ml_assets.decisions.feedback_quality import examine
from ml_assets.decisions.labels import LabelError, read_labels, write_requests
from ml_assets.endpoints.ledger import Ledger, Release
from ml_assets.settings import Settings
from ml_assets.traffic.records import OPERATOR, FeedbackRecord, Judged, TrafficRecord
from ml_assets.traffic.store import TrafficLog

START = datetime(2026, 3, 1, tzinfo=UTC)


def record(number: int, key: str = "key1", question: str | None = None) -> TrafficRecord:
    return TrafficRecord(
        id=f"chatcmpl-{number}",
        at=(START + timedelta(minutes=number)).isoformat(timespec="microseconds"),
        customization="home",
        key_id=key,
        adapter_digest="a" * 64,
        base_revision="tiny@0",
        messages=[{"role": "user", "content": question or f"question {number}"}],
        answer="yes",
        status=200,
        finish_reason="stop",
        prompt_tokens=3,
        completion_tokens=1,
        latency_ms=1.0,
        first_token_ms=1.0,
        mean_logprob=-0.1,
    )


def judged(
    number: int, key: str = "key1", right: str | None = "yes", question: str | None = None, minutes=None
) -> Judged:
    at = START + timedelta(minutes=number if minutes is None else minutes)
    feedback = FeedbackRecord(
        f"chatcmpl-{number}", at.isoformat(timespec="microseconds"), "home", key, None, right, seq=number
    )
    return Judged(record(number, key, question), feedback)


# -- labels --------------------------------------------------------------------------------------------


def test_labels_come_back_as_feedback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = TrafficLog(Settings.from_env().traffic_url)
    log.append([record(1), record(2, "key2"), record(3, question="one line\u2028another\x85")])
    path = tmp_path / "home" / "decision.jsonl"
    write_requests(path, [*log.requests("home"), record(4)])
    rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    assert rows[0] == {
        "request": "chatcmpl-1",
        "key": "key1",
        "at": rows[0]["at"],
        "prompt": "question 1",
        "answer": "yes",
        "right_answer": "",
    }
    for number, answer in ((1, "no"), (3, "ja")):
        rows[number]["right_answer"] = answer
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_requests(path, [record(1)])
    assert path.read_text().count("\n") == 4, "a file that somebody works on stays"
    assert main(["labels", "import", str(path)]) == 0
    assert "1 right answers stored. 1 requests are not kept any more." in capsys.readouterr().out
    (said,) = log.feedback("home")
    assert (said.request.id, said.feedback.right_answer, said.feedback.key_id) == (
        "chatcmpl-2",
        "no",
        OPERATOR,
    )
    log.close()


def test_labels_are_redacted_as_the_release_says(tmp_path: Path) -> None:
    log = TrafficLog(Settings.from_env().traffic_url)
    log.append([record(1), replace(record(2), customization="open")])
    with closing(Ledger(Settings.from_env().ledger_url)) as ledger:
        digest: dict[str, Any] = {
            "base_digest": "b" * 64,
            "adapter_digest": "a" * 64,
            "report_digest": "c" * 64,
        }
        why: dict[str, Any] = {"mlflow_version": "1", "run_id": "run", "actor": "test", "reason": "test"}
        policy = {"redact": ["phone"], "retention": "90d"}
        with ledger.release_transaction("open", "run") as transaction:
            transaction.record(Release("open", "tiny@0", **digest, **why, traffic_policy=policy))
    path = tmp_path / "labels.jsonl"
    rows = [
        {"request": f"chatcmpl-{n}", "key": "key1", "right_answer": "mail a@b.com or 030 1234567"}
        for n in (1, 2)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["labels", "import", str(path)]) == 0
    (default,), (stated,) = log.feedback("home"), log.feedback("open")
    assert default.feedback.right_answer == "mail [EMAIL] or [PHONE]"
    assert stated.feedback.right_answer == "mail a@b.com or [PHONE]"
    log.close()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", ":1: expected a JSON object"),
        ('{"request": "x"}', ":1: expected a JSON object with 'request'"),
        ('{"request": "x", "key": "k", "right_answer": 3}', ":1: expected texts"),
    ],
)
def test_a_damaged_file_of_labels_is_refused(tmp_path: Path, line: str, expected: str) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text(line)
    with pytest.raises(LabelError) as error:
        list(read_labels(path))
    assert expected in str(error.value)
    assert main(["labels", "import", str(path)]) == 1


# -- quality of feedback -------------------------------------------------------------------------------


def usual(count: int, keys: int = 5, first: int = 0) -> list[Judged]:
    """Feedback of several keys, one a minute, a tenth of it disagrees."""
    return [judged(n, f"key{n % keys}", "no" if n % 10 == 0 else "yes") for n in range(first, first + count)]


def test_usual_feedback_and_little_feedback_say_nothing() -> None:
    assert examine(usual(300)) == []
    assert examine(usual(20)) == [] and examine([]) == []


def test_one_key_that_takes_over_is_seen() -> None:
    found = examine([*usual(200), *(judged(n, "key9") for n in range(200, 300))])
    assert [(one.kind, one.key_id) for one in found] == [("one_key", "key9")]
    assert examine([judged(n, "only") for n in range(300)]) == [], "a single client is no change"


def test_answers_that_contradict_what_was_said_are_seen() -> None:
    said = [judged(n, f"key{n % 5}", "yes", f"question {n % 50}") for n in range(100)]
    flipped = [judged(100 + n, f"key{n % 5}", "NO", f"Question  {n % 50}") for n in range(100)]
    found = examine([*said, *flipped])
    assert "contradictions" in [one.kind for one in found]
    assert examine([*said, *said]) == []


def test_a_key_that_disagrees_with_everything_is_seen() -> None:
    new = [judged(n, f"key{n % 2}", "no" if n % 2 else "yes") for n in range(200, 300)]
    assert [(one.kind, one.key_id) for one in examine([*usual(200, keys=2), *new])] == [
        ("disagreement", "key1")
    ]
    # where all disagree more, the champion got worse: that is for the drift report to say
    assert examine([*usual(200, keys=2), *(judged(n, f"key{n % 2}", "no") for n in range(200, 300))]) == []


def test_a_flood_is_seen() -> None:
    flood = [judged(n, f"key{n % 5}", minutes=200 + (n - 200) / 60) for n in range(200, 300)]
    assert [one.kind for one in examine([*usual(200), *flood])] == ["flood"]
