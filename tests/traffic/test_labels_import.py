"""`evergreen labels import`: what the operator says is stored as the operator's."""

import json
from pathlib import Path

import pytest
from traffic_records import record

from ml_assets.cli.main import main
from ml_assets.settings import Settings
from ml_assets.traffic.records import OPERATOR
from ml_assets.traffic.store import TrafficLog


def test_imported_labels_are_the_operators(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = TrafficLog(Settings.from_env().traffic_url)
    asked = [record() for _ in range(3)]
    log.append(asked)
    rows = [
        {"request": one.id, "key": one.key_id, "right_answer": right}
        for one, right in zip(asked, ("T\u00fcr", "auf", ""), strict=True)
    ]
    path = tmp_path / "labels.jsonl"  # with a byte order mark and line ends as an editor on Windows writes
    path.write_bytes("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode("utf-8-sig"))
    assert main(["labels", "import", str(path)]) == 0
    assert "2 right answers stored" in capsys.readouterr().out
    found = [(one.feedback.key_id, one.feedback.right_answer) for one in log.feedback("home")]
    assert found == [(OPERATOR, "T\u00fcr"), (OPERATOR, "auf")]
    log.close()


def test_labels_that_are_not_utf_8_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "labels.jsonl"
    rows = [{"request": "chatcmpl-1", "key": "k", "right_answer": right} for right in ("auf", "T\u00fcr")]
    path.write_bytes("\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode("latin-1"))
    assert main(["labels", "import", str(path)]) == 1
    assert f"{path}:2: expected UTF-8" in capsys.readouterr().err
