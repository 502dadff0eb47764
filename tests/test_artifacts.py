import errno
import json
import logging
import os
import random
import shutil
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults import KILLS, broken, in_child
from hypothesis import given, settings
from hypothesis import strategies as st

from ml_assets.artifacts import (
    FILES,
    ArtifactError,
    ArtifactRef,
    ArtifactStore,
    canonical_json,
    read_json,
    sha256_bytes,
    write_atomic,
)

FILES_A = {"manifest.json": b"{}", "weights/model.safetensors": bytes(range(256)) * 40, "empty.txt": b""}


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "store"))


@pytest.fixture
def remote(tmp_path: Path):
    """A store that is read through a cache."""
    remote = ArtifactStore(f"memory://{tmp_path.name}", tmp_path / "cache")
    yield remote
    remote.fs.rm(remote.root, recursive=True)


def content(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != FILES
    }


def visible(store: ArtifactStore) -> list[str]:
    """Everything that a reader could find."""
    root = Path(store.root)
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if ".staging" not in p.parts)


def staged(store: ArtifactStore) -> list[Path]:
    return [path for path in (Path(store.root) / ".staging").glob("*") if path.is_dir()]


def names() -> st.SearchStrategy[str]:
    part = st.text(string.ascii_letters + string.digits + "ä-_ ", min_size=1, max_size=8)
    return st.lists(part, min_size=1, max_size=3).map("/".join).filter(lambda name: name != FILES)


def no_clash(files: dict[str, bytes]) -> bool:
    """No name is a folder of another one."""
    return not any(other.startswith(f"{name}/") for name in files for other in files)


PAYLOADS = st.dictionaries(names(), st.binary(max_size=300), min_size=1, max_size=5).filter(no_clash)


# -- what goes in comes out ----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(PAYLOADS, st.randoms(use_true_random=False))
def test_any_payload_round_trips_and_names_itself(tmp_path_factory, files, shuffle):
    folder = tmp_path_factory.mktemp("round")
    first, second = (
        ArtifactStore(str(folder / "a")),
        ArtifactStore("memory://" + folder.name, folder / "cache"),
    )
    ref = first.publish("dataset", files)
    assert content(first.open(ref)) == files
    shuffled = list(files.items())
    shuffle.shuffle(shuffled)
    source = folder / "elsewhere"  # another order, another place, other modes and times, empty folders
    (source / "empty" / "folder").mkdir(parents=True)
    for name, data in shuffled:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
        (source / name).chmod(0o600)
        os.utime(source / name, (1, 1))
    assert second.publish_directory("dataset", source) == ref
    assert content(second.open(ref)) == files
    assert first.publish("adapter", files) != ref
    changed = dict(files)
    name = shuffled[0][0]
    changed[name] += b"x"
    assert first.publish("dataset", changed) != ref
    assert first.publish("dataset", {**files, "one more": b""}) != ref
    second.delete(ref)
    shutil.rmtree(folder)


def test_digest_is_pinned(store):
    """Digests are the names of artifacts that exist already: this one must never change."""
    ref = store.publish("dataset", {"a.txt": b"a"})
    assert ref.digest == "6d451a555898859d1391cdf88781abc4179e1068c24a54996a1c5956e06daab1"


@pytest.mark.parametrize("url", ["plain", "file://", "memory://"])
def test_every_kind_of_url(tmp_path, url):
    where = str(tmp_path / "s") if url == "plain" else f"{url}{tmp_path / 's'}"
    store = ArtifactStore(where, tmp_path / "cache")
    ref = store.publish("dataset", FILES_A)
    assert store.publish("dataset", FILES_A) == ref
    assert content(store.open(ref)) == FILES_A
    store.remember("dataset", "k", ref, {"seconds": 3})
    assert store.recall("dataset", "k") == (ref, {"seconds": 3})
    store.delete(ref)
    store.delete(ref)
    assert not store.exists(ref)
    assert store.recall("dataset", "k") is None
    with pytest.raises(ArtifactError, match=f"dataset {ref.digest}: no such artifact"):
        store.open(ref)
    assert store.publish("dataset", FILES_A) == ref
    assert content(store.open(ref)) == FILES_A


def test_publish_from_another_file_system(store, tmp_path):
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system at /dev/shm")
    source = shared / f"evergreen-{os.getpid()}"
    source.mkdir()
    try:
        (source / "a.txt").write_text("a")
        ref = store.publish_directory("dataset", source)
        assert content(store.open(ref)) == {"a.txt": b"a"}
    finally:
        shutil.rmtree(source)
    assert staged(store) == []


def test_others_may_read(store):
    before = os.umask(0o022)
    try:
        directory = store.open(store.publish("dataset", FILES_A))
        assert directory.stat().st_mode & 0o777 == 0o755
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    "files", [{}, {FILES: b"{}"}, {"../a": b""}, {"/tmp/a": b""}, {"a/../b": b""}, {"": b""}]
)
def test_impossible_payloads_are_refused(store, files):
    with pytest.raises(ArtifactError):
        store.publish("dataset", files)
    assert visible(store) == []


@pytest.mark.parametrize("special", ["link", "broken link", "folder link", "pipe"])
def test_links_and_special_files_are_refused(store, tmp_path, special):
    (tmp_path / "outside").write_text("may change later")
    with store.staging("dataset") as directory:
        (directory / "a.txt").write_text("a")
        if special == "pipe":
            os.mkfifo(directory / "special")
        else:
            target = {"link": "outside", "broken link": "nothing", "folder link": "."}[special]
            (directory / "special").symlink_to(tmp_path / target)
        with pytest.raises(ArtifactError, match="special: expected plain files"):
            store.publish_directory("dataset", directory)
    assert visible(store) == []


# -- damage is named -----------------------------------------------------------------------------------


def change_bytes(directory: Path) -> str:
    (directory / "manifest.json").write_bytes(b"[]")
    return r"manifest\.json: hash is [0-9a-f]{64}, expected [0-9a-f]{64}"


def cut_short(directory: Path) -> str:
    os.truncate(directory / "weights" / "model.safetensors", 100)
    return r"weights/model\.safetensors: hash is"


def remove(directory: Path) -> str:
    (directory / "manifest.json").unlink()
    return r"cannot be read: .*No such file.*manifest\.json"


def add(directory: Path) -> str:
    (directory / "weights" / ".hidden").write_bytes(b"")
    return r"weights/\.hidden: not a file of artifact dataset:"


def change_listing(directory: Path) -> str:
    (directory / FILES).write_bytes((directory / FILES).read_bytes() + b" ")
    return r"files\.json: hash differs from the artifact's name"


def link(directory: Path) -> str:
    shutil.move(directory / "manifest.json", directory.parent / "moved.json")
    (directory / "manifest.json").symlink_to(directory.parent / "moved.json")
    return r"manifest\.json: expected plain files"


def unreadable(directory: Path) -> str:
    (directory / "manifest.json").unlink()
    (directory / "manifest.json").mkdir()
    return r"cannot be read: .*Is a directory.*manifest\.json"


DAMAGES = [change_bytes, cut_short, remove, add, change_listing, link, unreadable]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_publishing_again_heals_it(store, caplog, damage):
    ref = store.publish("dataset", FILES_A)
    message = damage(Path(store.open(ref)))
    with pytest.raises(ArtifactError, match=message):
        store.open(ref)
    with caplog.at_level(logging.WARNING):
        assert store.publish("dataset", FILES_A) == ref
    assert "replacing a damaged artifact" in caplog.text
    assert content(store.open(ref)) == FILES_A
    assert staged(store) == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_fetched_again(remote, damage):
    ref = remote.publish("dataset", FILES_A)
    damage(remote.open(ref))
    assert content(remote.open(ref)) == FILES_A


def test_a_damaged_remote_artifact_is_named_and_healed(remote):
    ref = remote.publish("dataset", FILES_A)
    remote.fs.pipe_file(f"{remote.location(ref)}/manifest.json", b"{")
    with pytest.raises(ArtifactError, match=r"manifest\.json: hash is"):
        remote.open(ref)
    assert remote.publish("dataset", FILES_A) == ref  # as after an upload that broke
    assert content(remote.open(ref)) == FILES_A
    remote.fs.pipe_file(f"{remote.location(ref)}/{FILES}", b"{}")
    with pytest.raises(ArtifactError, match=r"files\.json: hash differs"):
        ArtifactStore(f"memory://{remote.root}", remote.cache.parent / "cache 2").open(ref)
    remote.fs.rm(f"{remote.location(ref)}/{FILES}")
    assert not remote.exists(ref)
    remote.publish("dataset", FILES_A)
    remote.fs.rm(f"{remote.location(ref)}/manifest.json")
    with pytest.raises(ArtifactError, match=r"cannot be read from .*manifest\.json"):
        ArtifactStore(f"memory://{remote.root}", remote.cache.parent / "cache 3").open(ref)
    assert not list((remote.cache.parent / "cache 3").rglob("*.json"))


def test_a_remote_listing_can_not_write_outside_of_the_cache(remote):
    listing = canonical_json(
        {"kind": "dataset", "files": {"../../../x": {"bytes": 1, "sha256": sha256_bytes(b"x")}}}
    )
    ref = ArtifactRef("dataset", sha256_bytes(listing))
    remote.fs.makedirs(remote.location(ref), exist_ok=True)
    remote.fs.pipe_file(f"{remote.location(ref)}/{FILES}", listing)
    with pytest.raises(ArtifactError, match="expected a relative path without"):
        remote.open(ref)


def test_a_file_without_permission_is_named(store):
    ref = store.publish("dataset", FILES_A)
    path = store.open(ref) / "manifest.json"
    path.chmod(0)

    def read():
        if os.geteuid() == 0:
            os.setegid(65534)
            os.seteuid(65534)  # root may read anything
        with pytest.raises(ArtifactError, match=r"Permission denied.*manifest\.json"):
            store._verify(ref, path.parent)

    for folder in path.parents:
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    assert in_child(read) == 0


def test_reference_and_errors_read_well(store):
    assert str(ArtifactRef("adapter", "0123456789abcdef")) == "adapter:0123456789ab"
    with pytest.raises(ValueError, match=r"missing\.json: expected a readable JSON object"):
        read_json(Path("missing.json"))


# -- the disk fails ------------------------------------------------------------------------------------


def operations_of_a_publish(tmp_path: Path) -> list[str]:
    with broken(tmp_path, 0, "before") as seen:
        ArtifactStore(str(tmp_path / "dry")).publish("dataset", FILES_A)
    return seen


def test_disk_error_at_any_file_operation_leaves_nothing_half_visible(tmp_path):
    operations = operations_of_a_publish(tmp_path)
    assert {line.split()[0] for line in operations} >= {"mkdir", "write", "fsync", "rename"}
    for number, operation in enumerate(operations, 1):
        for code in (errno.ENOSPC, errno.EIO):
            store = ArtifactStore(str(tmp_path / f"{number}-{code}"))
            ref = None
            with broken(tmp_path, number, code):
                try:
                    ref = store.publish("dataset", FILES_A)
                except OSError as error:
                    assert error.errno == code, operation
            published = [Path(line) for line in visible(store) if line.endswith(FILES)]
            if ref or published:  # complete, or not there
                found = ref or ArtifactRef("dataset", published[0].parent.name)
                assert content(store.open(found)) == FILES_A, operation
            else:
                assert visible(store) in ([], ["dataset"]), operation
            again = store.publish("dataset", FILES_A)
            assert content(store.open(again)) == FILES_A, operation


@pytest.mark.parametrize("how", KILLS)
def test_killed_at_any_file_operation_leaves_nothing_half_visible(tmp_path, how):
    for number, operation in enumerate(operations_of_a_publish(tmp_path), 1):
        store = ArtifactStore(str(tmp_path / f"{number}"))

        def publish(store=store, number=number):
            with broken(tmp_path, number, how):
                store.publish("dataset", FILES_A)

        if in_child(publish) == 0:
            assert how != "before", operation
        for path in Path(store.root).glob("dataset/*"):
            assert content(store.open(ArtifactRef("dataset", path.name))) == FILES_A, operation
        again = store.publish("dataset", FILES_A)
        assert content(store.open(again)) == FILES_A, operation


@pytest.fixture
def small_disk(tmp_path: Path):
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_shows_nothing(small_disk):
    store = ArtifactStore(str(small_disk / "store"))
    small = store.publish("dataset", FILES_A)
    with pytest.raises(OSError) as raised:
        store.publish("dataset", {"a.bin": b"a" * 100_000, "b.bin": b"b" * 400_000})
    assert raised.value.errno == errno.ENOSPC
    assert [path.name for path in (small_disk / "store" / "dataset").iterdir()] == [small.digest]
    assert staged(store) == []
    assert content(store.open(small)) == FILES_A
    store.publish("dataset", {"a.bin": b"a" * 100_000})  # the space is free again


def test_a_full_disk_keeps_the_old_note(small_disk):
    path = small_disk / "notes" / "a.json"
    write_atomic(path, b"old")
    with pytest.raises(OSError):
        write_atomic(path, b"x" * 400_000)
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


# -- many processes ------------------------------------------------------------------------------------


def payload(number: int) -> dict[str, bytes]:
    return {f"part{i}/data.bin": bytes([number, i]) * 60_000 for i in range(4)} | {"manifest.json": b"{}"}


READER = """
import sys
from pathlib import Path
from ml_assets.artifacts import ArtifactRef, ArtifactStore
store, stop, rounds, opened = ArtifactStore(sys.argv[1]), Path(sys.argv[2]), 0, 0
while not stop.exists():
    for path in Path(store.root).glob("dataset/*"):
        store.open(ArtifactRef("dataset", path.name))
        opened += 1
    rounds += 1
print(rounds, opened)
"""


def test_no_reader_sees_part_of_what_killed_writers_leave(store, tmp_path):
    stop = tmp_path / "stop"
    command = [sys.executable, "-c", READER, store.root, str(stop)]
    reader = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    chance = random.Random(0)
    killed, longest = 0, 0.01
    for number in range(240):
        pid = os.fork()
        if pid == 0:
            os.nice(5)
            try:
                store.publish("dataset", payload(number % 60))
            finally:
                os._exit(0)
        time.sleep(chance.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
        died = os.waitpid(pid, 0)[1] == signal.SIGKILL
        killed += died
        # a staircase: however busy the machine is, the kill comes too late about as often as in time
        longest *= 1.1 if died else 1 / 1.1
    stop.touch()
    output, errors = reader.communicate(timeout=60)
    assert reader.returncode == 0, errors
    rounds, opened = map(int, output.split())
    assert killed >= 100 and rounds > 5 and opened > 50, (killed, rounds, opened)
    published = list(Path(store.root).glob("dataset/*"))
    assert 1 < len(published) <= 61
    for path in published:
        store.open(ArtifactRef("dataset", path.name))
    for number in range(60):  # every one of them can be published now
        store.open(store.publish("dataset", payload(number)))
    left = staged(store)
    assert left  # else the test killed nobody in the middle
    for path in left:
        os.utime(path, (1, 1))
    with store.staging("dataset") as living:
        assert staged(store) == [living]


def test_the_staging_of_a_living_process_is_left_alone(store):
    with store.staging("dataset") as living:
        (living / "a.txt").write_text("a")
        os.utime(living, (1, 1))
        in_child(lambda: store.publish("dataset", {"b.txt": b"b"}))
        store.publish("dataset", {"c.txt": b"c"})
        ref = store.publish_directory("dataset", living)
    assert content(store.open(ref)) == {"a.txt": b"a"}
    assert staged(store) == []


WRITER = """
import sys, time
from pathlib import Path
from ml_assets.artifacts import ArtifactStore
store = ArtifactStore(sys.argv[1], Path(sys.argv[2]))
Path(sys.argv[3]).touch()
while not Path(sys.argv[4]).exists():
    pass
for number in range(30):
    ref = store.publish("dataset", {"a.bin": bytes([number]) * 20_000, "n.txt": b"n"})
    store.open(ref)
    store.remember("dataset", f"key{number}", ref, {"number": number})
    assert store.recall("dataset", f"key{number}")[0] == ref
    print(ref.digest)
"""


@pytest.mark.parametrize("husks", [False, True])
def test_writers_of_the_same_content_all_succeed(store, tmp_path, husks):
    if husks:  # what interrupted deletions or a broken disk have left makes room, once
        for number in range(30):
            ref = store.publish("dataset", {"a.bin": bytes([number]) * 20_000, "n.txt": b"n"})
            (Path(store.location(ref)) / (FILES if number % 2 else "n.txt")).unlink()
    go = tmp_path / "go"
    processes = []
    for number in range(3):
        ready = tmp_path / f"ready{number}"
        command = [sys.executable, "-c", WRITER, store.root, str(tmp_path / "cache"), str(ready), str(go)]
        processes.append(
            (subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True), ready)
        )
    while not all(ready.exists() for _, ready in processes):
        assert all(process.poll() is None for process, _ in processes)
        time.sleep(0.01)
    go.touch()
    outputs = [process.communicate() for process, _ in processes]
    assert [process.returncode for process, _ in processes] == [0] * 3, outputs
    assert len({output for output, _ in outputs}) == 1
    assert len(list(Path(store.root).glob("dataset/*"))) == 30
    assert staged(store) == []


def test_a_writer_finds_room_while_another_replaces_what_is_damaged(store, monkeypatch):
    ref = store.publish("dataset", FILES_A)
    (Path(store.location(ref)) / FILES).unlink()
    rename, raced = os.rename, []

    def racing(source, target):
        rename(source, target)
        if Path(target).name == "damaged" and not raced:
            raced.append(store.publish("dataset", FILES_A))

    monkeypatch.setattr(os, "rename", racing)
    assert store.publish("dataset", FILES_A) == ref and raced == [ref]
    store.open(ref)
    assert staged(store) == []


# -- memo ----------------------------------------------------------------------------------------------


def test_recall_without_the_artifact_or_the_note(store):
    ref = store.publish("dataset", FILES_A)
    assert store.recall("dataset", "k") is None
    store.remember("dataset", "k", ref, {"cost": 1.5, "run": "ä"})
    assert store.recall("dataset", "k") == (ref, {"cost": 1.5, "run": "ä"})
    other = store.publish("dataset", {"b.txt": b"b"})
    store.remember("dataset", "k", other, {})
    assert store.recall("dataset", "k") == (other, {})
    (Path(store.location(other)) / FILES).unlink()
    assert store.recall("dataset", "k") is None


@pytest.mark.parametrize(
    "damaged", [b"", b"{", b"[]", b"null", b"{}", b'{"sha256": 3}', b"\xff", b'"text"', "digest"]
)
def test_a_damaged_note_is_named(store, damaged):
    ref = store.publish("dataset", FILES_A)
    store.remember("dataset", "k", ref, {"cost": 1})
    path = Path(store.root) / "index" / "dataset" / "k.json"
    if damaged == "digest":
        damaged = canonical_json({**json.loads(path.read_bytes()), "digest": "0" * 64})
    path.write_bytes(damaged)
    with pytest.raises(ArtifactError, match=r"index/dataset/k\.json"):
        store.recall("dataset", "k")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_one_changed_byte_of_a_note_is_noticed(tmp_path_factory, data):
    store = ArtifactStore(str(tmp_path_factory.mktemp("memo")))
    ref = store.publish("dataset", {"a": b"a"})
    store.remember("dataset", "k", ref, {"cost": 1})
    path = Path(store.root) / "index" / "dataset" / "k.json"
    raw = bytearray(path.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    with pytest.raises(ArtifactError, match=r"k\.json"):
        store.recall("dataset", "k")
    shutil.rmtree(store.root)


@pytest.mark.parametrize("how", KILLS)
def test_write_atomic_killed_at_any_operation_leaves_old_or_new(tmp_path, how):
    path = tmp_path / "deep" / "folder" / "note.json"
    with broken(tmp_path, 0, "before") as operations:
        write_atomic(path, b"old" * 1000)
    for number in range(1, len(operations) + 1):
        shutil.rmtree(tmp_path / "deep")
        write_atomic(path, b"old" * 1000)

        def write(number=number):
            with broken(tmp_path, number, how):
                write_atomic(path, b"new" * 1000)

        in_child(write)
        assert path.read_bytes() in (b"old" * 1000, b"new" * 1000)
