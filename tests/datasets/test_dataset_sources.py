import bz2
import datetime
import gzip
import json
import lzma
import sqlite3
import threading
import traceback
from collections.abc import Iterator
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pandas as pd
import pytest
from maintenance_world import make_spec

from ml_assets.artifacts import ArtifactStore
from ml_assets.datasets.asset import build_source_asset
from ml_assets.datasets.build import build_dataset
from ml_assets.datasets.sources import (
    LOOKAHEAD,
    SourceError,
    describe,
    read_source,
    source_columns,
    source_version,
)
from ml_assets.settings import Settings
from ml_assets.spec import FileSource, HuggingFaceSource, PythonSource, SqlSource

ROWS = [{"question": f"question {i}", "answer": f"Antwort {i} ü", "score": i} for i in range(6)]


def jsonl(path: Path, rows=ROWS) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read(source, root):
    return read_source(source, root, Settings.from_env())


def version(source, root):
    return source_version(source, root, Settings.from_env())


def test_one_content_in_every_kind_of_file_has_one_version(tmp_path):
    text = [{**row, "score": str(row["score"])} for row in ROWS]
    jsonl(tmp_path / "faq.jsonl", text)
    frame = pd.DataFrame(text)
    frame.to_csv(tmp_path / "faq.csv", index=False)
    frame.to_csv(tmp_path / "semicolons.csv", index=False, sep=";")
    frame.to_csv(tmp_path / "faq.csv.gz", index=False)
    frame.to_parquet(tmp_path / "faq.parquet")
    with sqlite3.connect(tmp_path / "faq.db") as connection:
        frame.to_sql("faq", connection, index=False)
    (tmp_path / "faqs.py").write_text(
        "import json\nfrom pathlib import Path\n"
        "def rows(start=0):\n"
        "    lines = (Path(__file__).parent / 'faq.jsonl').read_text().splitlines()\n"
        "    return (json.loads(line) for line in lines[start:])\n"
    )
    sources = [
        FileSource(kind="jsonl", path="faq.jsonl"),
        FileSource(kind="csv", path="faq.csv"),
        FileSource(kind="csv", path="semicolons.csv"),
        FileSource(kind="csv", path="faq.csv.gz"),
        FileSource(kind="parquet", path=str(tmp_path / "faq.parquet")),
        FileSource(kind="jsonl", path=f"file://{tmp_path}/faq.jsonl"),
        SqlSource(kind="sql", url="sqlite:///faq.db", query="select * from faq order by score desc"),
        PythonSource(kind="python", callable="faqs:rows"),
    ]
    versions = set()
    for source in sources:
        found = read(source, tmp_path)
        assert sorted(found.rows, key=lambda row: row["score"]) == text, source
        assert found.columns == ["question", "answer", "score"]
        versions.add(found.version())
    assert len(versions) == 1
    assert (
        version(PythonSource(kind="python", callable="faqs:rows", args={"start": 1}), tmp_path)
        not in versions
    )


def test_version_is_the_content_not_the_order_of_files_or_rows_or_their_time(tmp_path):
    source = FileSource(kind="jsonl", path="*.jsonl")
    jsonl(tmp_path / "a.jsonl", ROWS[:2])
    jsonl(tmp_path / "b.jsonl", ROWS[2:])
    before = version(source, tmp_path)
    jsonl(tmp_path / "a.jsonl", ROWS[:1:-1])
    jsonl(tmp_path / "b.jsonl", ROWS[1::-1])
    assert version(source, tmp_path) == before
    jsonl(tmp_path / "c.jsonl", ROWS[:1])
    assert version(source, tmp_path) != before, "a repeated row is a change"
    jsonl(tmp_path / "c.jsonl", [])
    assert version(source, tmp_path) == before
    jsonl(tmp_path / "b.jsonl", [*ROWS[:1], {**ROWS[1], "score": 2}])
    assert version(source, tmp_path) != before


def test_memory_url_and_folder_with_magic_characters(tmp_path):
    with fsspec.open("memory://shop/faq-1.jsonl", "w") as file:
        file.write(json.dumps(ROWS[0]))
    with fsspec.open("memory://shop/faq-2.jsonl", "w") as file:
        file.write(json.dumps(ROWS[1]))
    source = FileSource(kind="jsonl", path="memory://shop/faq-*.jsonl")
    assert read(source, tmp_path).rows == ROWS[:2]
    assert source_columns(source, tmp_path) is None
    odd = tmp_path / "odd [1]"
    odd.mkdir()
    jsonl(odd / "faq.jsonl")
    assert len(read(FileSource(kind="jsonl", path="*.jsonl"), odd).rows) == 6
    assert len(read(FileSource(kind="jsonl", path="faq.jsonl"), odd).rows) == 6


def test_broken_jsonl_rows_are_named(tmp_path):
    (tmp_path / "faq.jsonl").write_bytes(
        b'\xef\xbb\xbf{"q": "a"}\n\n{"q": "b"\n[1, 2]\n{"q": "\xff"}\n{"q": "caf\xc3\xa9\xe2\x80\xa8"}\r\n'
    )
    found = read(FileSource(kind="jsonl", path="faq.jsonl"), tmp_path)
    assert found.rows == [{"q": "a"}, {"q": "café\u2028"}]
    assert found.places == ["faq.jsonl:1", "faq.jsonl:6"]
    assert [str(row) for row in found.bad] == [
        """faq.jsonl:3: not JSON (Expecting ',' delimiter at column 1) in '{"q": "b"'""",
        "faq.jsonl:4: expected a JSON object, found list in '[1, 2]'",
        """faq.jsonl:5: not UTF-8 at byte 8 in '{"q": "\ufffd"}'""",
    ]


def test_broken_csv_rows_are_named(tmp_path):
    (tmp_path / "faq.csv").write_text('q,a\none,1\ntwo\n"three\nlines",3\nfour,4,5\nfive,\n')
    found = read(FileSource(kind="csv", path="faq.csv"), tmp_path)
    assert found.rows == [{"q": "one", "a": "1"}, {"q": "three\nlines", "a": "3"}, {"q": "five", "a": ""}]
    assert [str(row) for row in found.bad] == [
        "faq.csv:3: expected 2 fields, found 1 in 'two'",
        "faq.csv:6: expected 2 fields, found 3 in 'four, 4'",
    ]


@pytest.mark.parametrize("header", [",text,label", "text,label,", "text,,label"])
def test_a_csv_column_without_a_name_does_not_hide_surplus_fields(tmp_path, header):
    (tmp_path / "faq.csv").write_text(f'{header}\na,"b, c",d\ne,f, g,h\ni,j,k\n')
    found = read(FileSource(kind="csv", path="faq.csv"), tmp_path)
    names = header.split(",")
    assert found.rows == [dict(zip(names, row, strict=True)) for row in (("a", "b, c", "d"), ("i", "j", "k"))]
    assert [str(row) for row in found.bad] == ["faq.csv:3: expected 3 fields, found 4 in 'e, f,  g'"]


def test_text_and_numbers_that_nobody_can_write_are_bad_rows_with_their_place(tmp_path):
    (tmp_path / "faq.jsonl").write_text(
        '{"q": "hi \\ud83d"}\n{"q": "\\ud83d\\ude00"}\n{"q": ' + "9" * 5000 + '}\n{"\\udc00": [1]}\n'
    )
    found = read(FileSource(kind="jsonl", path="faq.jsonl"), tmp_path)
    assert found.rows == [{"q": "😀"}]
    assert [row.place for row in found.bad] == ["faq.jsonl:1", "faq.jsonl:3", "faq.jsonl:4"]
    assert "surrogates not allowed" in found.bad[0].reason and "hi" in found.bad[0].text
    assert found.bad[1].reason == "not JSON (a number with too many digits)"
    assert len(found.version()) == 64
    (tmp_path / "huge_rows.py").write_text("def rows(): return [{'q': 10**5000}, {'q': '\\ud83d'}]\n")
    found = read(PythonSource(kind="python", callable="huge_rows:rows"), tmp_path)
    assert [row.place for row in found.bad] == ["rows(), row 1", "rows(), row 2"]
    assert len(found.version()) == 64


LINES = "".join(f'{{"q": "question {i} {i * 7919 % 9973}"}}\n' for i in range(3000)).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.jsonl.gz", gzip.compress(LINES)[:300]),
        ("half.jsonl.gz", gzip.compress(LINES)[:9000]),
        ("flipped.jsonl.gz", gzip.compress(LINES)[:200] + b"\0\1\2\3" * 50 + gzip.compress(LINES)[400:]),
        ("cut.jsonl.bz2", bz2.compress(LINES)[:300]),
        ("cut.jsonl.xz", lzma.compress(LINES)[:300]),
        ("junk.jsonl.xz", b"\xfd7zXZ\0" + b"junk" * 9),
        ("junk.jsonl.zip", b"PK\3\4junk"),
        ("cut.csv.gz", gzip.compress(b"q\n" + LINES.replace(b'"', b""))[:300]),
    ],
)
def test_a_damaged_file_is_one_clear_error_and_lets_the_project_load(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    source = FileSource(kind=name.split(".")[1], path=name)
    assert source_columns(source, tmp_path) in (None, (["q"], True), (["q"], False))
    with pytest.raises(SourceError, match=rf"{name}: cannot be read: "):
        read(source, tmp_path)


@pytest.fixture
def ill_server() -> Iterator[str]:
    """A web server that answers 503 to every path but /short.jsonl, whose body breaks off."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            short = self.path == "/short.jsonl"
            self.send_response(200 if short else 503)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"q": 1}')

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_server_that_is_away_or_ill_may_be_asked_again(tmp_path, ill_server):
    for url in ("http://127.0.0.1:1/away.jsonl", f"{ill_server}/ill.jsonl", f"{ill_server}/short.jsonl"):
        source = FileSource(kind="jsonl", path=url)
        with pytest.raises(SourceError, match=f"{url}: cannot be read: ") as caught:
            read(source, tmp_path)
        assert isinstance(caught.value.__cause__, OSError), "an OSError is tried again"
        assert source_columns(source, tmp_path) is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (FileSource(kind="jsonl", path="no.jsonl"), r"no\.jsonl: no such file \(from "),
        (FileSource(kind="jsonl", path="no/*.jsonl"), r"no/\*\.jsonl: no such file"),
        (FileSource(kind="jsonl", path="empty.jsonl"), r"empty\.jsonl: the source is empty"),
        (FileSource(kind="csv", path="header.csv"), r"header\.csv: the source is empty"),
        (FileSource(kind="csv", path="twice.csv"), r"twice\.csv:1: expected different column names"),
        (FileSource(kind="csv", path="latin.csv"), r"latin\.csv: not UTF-8 at byte"),
        (FileSource(kind="csv", path="quote.csv"), r"quote\.csv: not CSV: "),
        (FileSource(kind="parquet", path="empty.jsonl"), r"empty\.jsonl: not Parquet: "),
        (
            FileSource(kind="jsonl", path="folder"),
            r"folder is a folder, expected files such as folder/\*\.jsonl",
        ),
        (FileSource(kind="jsonl", path="nosuch://a"), r"nosuch://a: expected a path or an fsspec URL: "),
        (SqlSource(kind="sql", url="sqlite:///no.db", query="select 1"), r"sqlite:///no\.db: no such file"),
        (SqlSource(kind="sql", url="sqlite://", query="select nope"), "the query failed: .*no such column"),
        (
            SqlSource(kind="sql", url="postgresql+nosuch://u:secret@h/db", query="select 1"),
            r"postgresql\+nosuch://u:\*\*\*@h/db: the query failed",
        ),
        (SqlSource(kind="sql", url="what is this", query="select 1"), "a database: the query failed"),
        (
            PythonSource(kind="python", callable="nosuchmodule:f"),
            "nosuchmodule:f: cannot be imported: No module",
        ),
        (
            PythonSource(kind="python", callable="wrong_rows:nothing"),
            "wrong_rows:nothing: cannot be imported",
        ),
        (
            PythonSource(kind="python", callable="wrong_rows:number"),
            "expected an iterable of dicts .*found int",
        ),
        (PythonSource(kind="python", callable="wrong_rows:fails"), "fails: raised KeyError: 'x'"),
        (PythonSource(kind="python", callable="wrong_rows:number", args={"n": 1}), "raised TypeError"),
        (PythonSource(kind="python", callable="wrong_rows:none"), "wrong_rows:none: the source is empty"),
    ],
)
def test_what_cannot_be_read_is_one_clear_error(tmp_path, source, message):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "header.csv").write_text("a,b\n")
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n")
    (tmp_path / "latin.csv").write_bytes(b"a,b\n1,caf\xe9\n")
    (tmp_path / "quote.csv").write_text('a,b\n"1"x,2\n')
    (tmp_path / "folder").mkdir()
    (tmp_path / "wrong_rows.py").write_text(
        "def number(): return 3\ndef fails(): return {}['x']\ndef none(): return []\n"
    )
    with pytest.raises(SourceError, match=message) as caught:
        read(source, tmp_path)
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "no.db").exists()


def test_rows_of_python_that_are_not_dicts(tmp_path):
    (tmp_path / "mixed_rows.py").write_text("def rows(): return [{'q': 1}, 'text', None]\n")
    found = read(PythonSource(kind="python", callable="mixed_rows:rows"), tmp_path)
    assert found.rows == [{"q": 1}]
    assert [str(row) for row in found.bad] == [
        "rows(), row 2: expected a dict, found str in \"'text'\"",
        "rows(), row 3: expected a dict, found NoneType in 'None'",
    ]


def test_values_become_plain(tmp_path):
    (tmp_path / "plain_rows.py").write_text(
        "import pandas as pd, numpy as np, datetime, decimal\n"
        "def rows():\n"
        "    return pd.DataFrame({'n': [1, None], 'd': [pd.Timestamp('2024-05-01'), pd.NaT],\n"
        "        'x': [decimal.Decimal('1.50'), b'a'], 'l': [np.array([1, 2]), {'k': np.float32(0.5)}],\n"
        "        'u': [datetime.date(2024, 5, 1), True]})\n"
    )
    found = read(PythonSource(kind="python", callable="plain_rows:rows"), tmp_path)
    assert found.rows == [
        {"n": 1.0, "d": "2024-05-01T00:00:00", "x": "1.50", "l": [1, 2], "u": "2024-05-01"},
        {"n": None, "d": None, "x": "YQ==", "l": {"k": 0.5}, "u": True},
    ]
    table = pd.DataFrame({"d": [datetime.datetime(2024, 5, 1)], "x": [Decimal("1.50")], "n": [float("nan")]})
    table.to_parquet(tmp_path / "plain.parquet")
    assert read(FileSource(kind="parquet", path="plain.parquet"), tmp_path).rows == [
        {"d": "2024-05-01T00:00:00", "x": "1.50", "n": None}
    ]


def test_hugging_face_dataset_in_a_local_folder(tmp_path):
    folder = tmp_path / "faq"
    folder.mkdir()
    jsonl(folder / "train.jsonl")
    source = HuggingFaceSource(kind="huggingface", id="faq", revision="main")
    assert read(source, tmp_path).rows == ROWS
    with pytest.raises(
        SourceError, match=r'dataset faq@main \(holdout\): ValueError: Unknown split "holdout"'
    ):
        read(source.model_copy(update={"split": "holdout"}), tmp_path)
    with pytest.raises(SourceError, match="dataset nobody/nothing@main"):
        read(source.model_copy(update={"id": "nobody/nothing"}), tmp_path)


def test_columns_at_first_look(tmp_path):
    jsonl(tmp_path / "a.jsonl", [{"q": 1}, {"q": 2, "late": 3}])
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "a.csv").write_text("q;a\n1;2\n")
    pd.DataFrame({"q": [1], "a": [2]}).to_parquet(tmp_path / "a.parquet")

    def columns(kind, path):
        return source_columns(FileSource(kind=kind, path=path), tmp_path)

    assert columns("jsonl", "*a.jsonl") == (["q", "late"], True)
    assert columns("csv", "a.csv") == (["q", "a"], True)
    assert columns("parquet", "a.parquet") == (["q", "a"], True)
    jsonl(tmp_path / "many.jsonl", [{"q": n} for n in range(LOOKAHEAD)])
    (tmp_path / "more.csv").write_text("q;late\n1;2\n")
    assert columns("jsonl", "many.jsonl") == (["q"], True)
    assert columns("jsonl", "m*.jsonl") == (["q"], True)
    jsonl(tmp_path / "more.jsonl", [{"q": 1, "late": 1}])
    assert columns("jsonl", "m*.jsonl") == (["q"], False)
    assert columns("csv", "*.csv") == (["q", "a", "late"], True)
    assert columns("jsonl", "broken.jsonl") is None
    assert columns("jsonl", "missing.jsonl") is None
    assert source_columns(SqlSource(kind="sql", url="sqlite://", query="select 1"), tmp_path) is None


WITH_SECRETS = {
    "a password": FileSource(kind="csv", path="http://bob:hunter2@127.0.0.1:1/rows.csv"),
    "a password with other characters": FileSource(
        kind="csv", path="http://bob:h/unter2@127.0.0.1:1/rows.csv"
    ),
    "a user that is a token": FileSource(kind="csv", path="http://hunter2@127.0.0.1:1/rows.csv"),
    "a signed URL": FileSource(kind="csv", path="http://127.0.0.1:1/rows.csv?v=1&X-Amz-Signature=hunter2"),
    "a signed glob": FileSource(kind="jsonl", path="nosuch://h/*.jsonl?sig=hunter2"),
    "SQL": SqlSource(kind="sql", url="postgresql+nosuch://bob:hunter2@h/db", query="select 1"),
    "SQL with other characters": SqlSource(
        kind="sql", url="postgresql+nosuch://bob:p@h/unter2@h/db", query="select 1"
    ),
    "SQL with parameters": SqlSource(
        kind="sql", url="postgresql+nosuch://h/db?user=bob&password=hunter2", query="select 1"
    ),
    "Python": PythonSource(kind="python", callable="crm_rows:away", args={"token": "hunter2"}),
    "Python, deeper": PythonSource(
        kind="python", callable="crm_rows:away_behind", args={"token": ["hunter2"], "rows": 3}
    ),
}


@pytest.mark.parametrize("case", WITH_SECRETS)
def test_descriptions_and_errors_keep_passwords_out(tmp_path, case):
    source = WITH_SECRETS[case]
    (tmp_path / "crm_rows.py").write_text(
        "def away(token):\n    raise OSError(f'http://crm/rows?token={token} does not answer')\n"
        "def away_behind(token, rows):\n"
        "    try:\n        away(token[0])\n"
        "    except OSError as error:\n        raise ValueError('no rows') from error\n"
    )
    spec = make_spec().model_copy(update={"source": source})
    (asset,) = build_source_asset(spec, tmp_path).specs
    with pytest.raises(SourceError) as caught:
        read(source, tmp_path)
    # what Dagster stores of a failure: the error, and all that led to it
    told = "".join(traceback.format_exception(caught.value))
    for text in (describe(source), asset.description, told):
        assert text and "unter2" not in text
    if case in ("a password", "Python"):
        assert isinstance(caught.value.__cause__, OSError), "an OSError is tried again"


def test_a_manifest_names_arguments_without_their_values(tmp_path):
    (tmp_path / "paid_rows.py").write_text(
        "def rows(token, rows):\n"
        "    return [{'text': f'question {n} {n * 7919 % 9973}', 'answer': str(n)} for n in range(rows)]\n"
    )
    args = {"token": "hunter2", "rows": 90}
    spec = make_spec(source={"kind": "python", "callable": "paid_rows:rows", "args": args})
    settings = Settings.from_env()
    built = build_dataset(
        spec, tmp_path, settings, ArtifactStore(str(tmp_path / "store"), tmp_path / "cache")
    )
    (manifest,) = (tmp_path / "store").rglob("manifest.json")
    assert "hunter2" not in manifest.read_text()
    assert json.loads(manifest.read_text())["spec"]["source"] == "python: paid_rows:rows(token, rows)"
    assert built.record["rows"]["train"] > 0
