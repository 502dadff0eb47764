import errno
import json
from pathlib import Path

import pytest

from ml_assets.artifacts import ArtifactStore
from ml_assets.datasets.build import build_dataset
from ml_assets.datasets.snapshot import load_manifest, load_rows
from ml_assets.datasets.sources import SourceError
from ml_assets.settings import Settings
from ml_assets.spec import CustomizationSpec


def spec(**changes) -> CustomizationSpec:
    return CustomizationSpec(
        **{
            "name": "faq",
            "source": {"kind": "jsonl", "path": "faq.jsonl"},
            "prompt": {"user": "{q}", "target": "{a}"},
            "base_models": ["base"],
            "evaluation": {"task": "text"},
            **changes,
        }
    )


def write(folder: Path, count: int, start: int = 0) -> None:
    rows = [
        {"q": f"Where is item {n} of {n * 7919 % 997}?", "a": f"shelf {n}"}
        for n in range(start, start + count)
    ]
    (folder / "faq.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.fixture
def store(tmp_path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "artifacts"))


def build(folder: Path, store: ArtifactStore, accept=lambda record: None, **changes):
    return build_dataset(spec(**changes), folder, Settings.from_env(), store, accept)


def published(store: ArtifactStore) -> list[str]:
    return sorted(path.name for path in Path(store.root, "dataset").glob("*"))


def test_unchanged_inputs_build_nothing(tmp_path, store, monkeypatch):
    write(tmp_path, 60)
    first = build(tmp_path, store)
    assert not first.reused
    directory = store.open(first.ref)
    assert len(load_rows(directory, "train")) == first.record["rows"]["train"]

    def never(*_):
        raise AssertionError("built again")

    monkeypatch.setattr("ml_assets.datasets.build.build_snapshot", never)
    again = build(tmp_path, store)
    assert (again.ref, again.reused, again.record) == (first.ref, True, first.record)
    # what the adapter does with the rows is not the dataset's business, a description even less
    assert build(tmp_path, store, description="new", adapter={"rank": 4}).ref == first.ref
    with pytest.raises(AssertionError, match="built again"):
        build(tmp_path, store, dataset={"evaluation_share": 0.5})


def test_another_file_with_the_same_rows_is_the_same_dataset(tmp_path, store):
    write(tmp_path, 60)
    first = build(tmp_path, store)
    lines = (tmp_path / "faq.jsonl").read_text().splitlines()
    (tmp_path / "faq.jsonl").write_text("\n\n".join(reversed(lines)))
    assert build(tmp_path, store).reused
    # a column that the customization does not read: another source version, the same rows
    (tmp_path / "faq.jsonl").write_text("\n".join(line[:-1] + ', "note": "x"}' for line in lines))
    second = build(tmp_path, store)
    assert second.source_version != first.source_version
    assert (second.ref, second.reused) == (first.ref, False)
    assert len(published(store)) == 1


def test_the_next_snapshot_keeps_the_evaluation_rows_and_names_its_parent(tmp_path, store):
    write(tmp_path, 60)
    first = build(tmp_path, store)
    write(tmp_path, 60, start=40)
    second = build(tmp_path, store)
    assert second.ref != first.ref
    before = load_rows(store.open(first.ref), "evaluation")
    after = load_rows(store.open(second.ref), "evaluation")
    assert {row["_row"] for row in before} <= {row["_row"] for row in after}
    assert load_manifest(store.open(second.ref))["parent"] == first.ref.digest
    assert second.record["measured"]["kept_from_parent"] == len(before)
    # back to the old source: its training rows, and all evaluation rows there ever were
    write(tmp_path, 60)
    third = build(tmp_path, store)
    assert load_rows(store.open(third.ref), "train") == load_rows(store.open(first.ref), "train")
    assert load_rows(store.open(third.ref), "evaluation") == after


def test_new_code_that_gives_the_same_rows_keeps_the_artifact(tmp_path, store, monkeypatch):
    write(tmp_path, 60)
    with monkeypatch.context() as patch:
        for module in ("build", "snapshot"):
            patch.setattr(f"ml_assets.datasets.{module}.CODE_VERSION", "1")
        first = build(tmp_path, store)
    second = build(tmp_path, store)
    assert (second.ref, second.reused) == (first.ref, False)
    assert build(tmp_path, store).reused


def test_two_homes_give_the_same_digest(tmp_path):
    write(tmp_path, 60)
    refs = {build(tmp_path, ArtifactStore(str(tmp_path / name))).ref for name in ("one", "two")}
    assert len(refs) == 1


def test_a_refused_snapshot_is_not_published(tmp_path, store):
    write(tmp_path, 60)
    first = build(tmp_path, store)
    write(tmp_path, 3)

    def refuse(record):
        raise RuntimeError(record["rows"]["train"])

    for _ in range(2):
        with pytest.raises(RuntimeError):
            build(tmp_path, store, accept=refuse)
    assert published(store) == [first.ref.digest]
    write(tmp_path, 60)
    assert build(tmp_path, store).ref == first.ref, "it is still the parent"


def test_a_full_disk_leaves_nothing_visible(tmp_path, store, monkeypatch):
    write(tmp_path, 60)
    first = build(tmp_path, store)
    write(tmp_path, 80)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    for target in ("pyarrow.parquet.write_table", "os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(target, full)
            with pytest.raises(OSError, match="No space left"):
                build(tmp_path, store)
        assert published(store) == [first.ref.digest]
        assert not list(Path(store.root, ".staging").iterdir())
    second = build(tmp_path, store)
    assert load_manifest(store.open(second.ref))["parent"] == first.ref.digest


def test_errors_of_the_source_pass_through(tmp_path, store):
    with pytest.raises(SourceError, match=r"faq\.jsonl: no such file"):
        build(tmp_path, store)
