import errno
import json
import logging
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faults import KILLS, broken, in_child
from hypothesis import given, settings
from hypothesis import strategies as st

from ml_assets.engine.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

TENSORS = {
    "weight": torch.linspace(-3, 3, 24).reshape(2, 3, 4),
    "half": torch.linspace(-3, 3, 7).to(torch.bfloat16),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "mask": torch.tensor([True, False]),
    "steps": torch.tensor([2**40], dtype=torch.int64),
}


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return tensor.dtype, tensor.shape, raw


def assert_same(found: Checkpoint | None, step: int, tensors: dict[str, torch.Tensor], state: dict) -> None:
    assert found is not None
    assert (found.step, found.state) == (step, state)
    assert {k: bits(v) for k, v in found.tensors.items()} == {k: bits(v) for k, v in tensors.items()}


def at(step: int) -> dict[str, torch.Tensor]:
    return {
        name: tensor.logical_not() if name == "mask" and step % 2 else tensor * 1 + step
        for name, tensor in TENSORS.items()
        if name != "mask"
    } | {"mask": torch.tensor([step % 2 == 0])}


def test_round_trip(tmp_path):
    state = {"loss": [0.1, 1e-300], "order": [3, 1, 2], "seed": 2**80, "text": "ä\0", "none": None}
    save_checkpoint(tmp_path, 7, TENSORS, state)
    assert_same(load_checkpoint(tmp_path), 7, TENSORS, state)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007.safetensors"]


def test_special_floats_keep_their_bits(tmp_path):
    raw = torch.tensor([0x7FC00001, 0xFF800001, 0x80000000, 1], dtype=torch.uint32)
    tensors = {"f32": raw.view(torch.float32), "bf16": raw.view(torch.bfloat16), "u8": raw.view(torch.uint8)}
    save_checkpoint(tmp_path, 1, tensors, {})
    assert_same(load_checkpoint(tmp_path), 1, tensors, {})


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.float16]),
            st.binary(max_size=6).map(lambda data: data * 8),
        ),
        max_size=4,
    ),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    ),
)
def test_any_content_round_trips(tmp_path_factory, given, value):
    tensors = {
        name: torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype)
        if data
        else torch.zeros(0, dtype=dtype)
        for name, (dtype, data) in given.items()
    }
    directory = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(directory, 0, tensors, {"value": value})
    assert_same(load_checkpoint(directory), 0, tensors, {"value": value})
    shutil.rmtree(directory)


def test_random_numbers_continue(tmp_path):
    torch.manual_seed(3)
    torch.randn(5)
    save_checkpoint(tmp_path, 1, {"rng": torch.get_rng_state()}, {})
    expected = torch.randn(5)
    torch.manual_seed(0)
    found = load_checkpoint(tmp_path)
    assert found
    torch.set_rng_state(found.tensors["rng"])
    assert torch.equal(torch.randn(5), expected)


def test_tensors_that_share_memory_or_are_not_contiguous(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"base": base, "row": base[1], "turned": base.T, "grad": base.clone().requires_grad_()}
    save_checkpoint(tmp_path, 1, tensors, {})
    found = load_checkpoint(tmp_path)
    assert found and all(torch.equal(found.tensors[name], tensors[name]) for name in tensors)
    found.tensors["row"].zero_()  # loaded tensors are writable and separate
    assert torch.equal(found.tensors["base"], base)


def test_keeps_the_newest_and_the_one_before(tmp_path):
    for step in (5, 10, 15):
        save_checkpoint(tmp_path, step, at(step), {})
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-00000010.safetensors",
        "step-00000015.safetensors",
    ]


def test_nothing_there(tmp_path):
    assert load_checkpoint(tmp_path) is None
    assert load_checkpoint(tmp_path / "missing") is None


@pytest.mark.parametrize("state", [{"loss": math.nan}, {"path": Path("x")}])
def test_state_that_is_not_json_is_refused(tmp_path, state):
    save_checkpoint(tmp_path, 1, at(1), {})
    with pytest.raises((TypeError, ValueError)):
        save_checkpoint(tmp_path, 2, at(2), state)
    assert_same(load_checkpoint(tmp_path), 1, at(1), {})


def damage(data: bytes, how: str) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    match how:
        case "empty":
            return b""
        case "half":
            return data[: len(data) // 2]
        case "longer":
            return data + b"\0"
        case "zeros":
            return bytes(len(data))
        case "flipped bit":
            return data[:8] + header + body[:9] + bytes([body[9] ^ 1]) + body[10:]
        case "changed state":
            return data[:8] + header.replace(b'\\"epoch\\":1', b'\\"epoch\\":9') + body
        case "no metadata":
            fields = json.loads(header)
            del fields["__metadata__"]
            header = json.dumps(fields).encode()
            return len(header).to_bytes(8, "little") + header + body
        case "text":
            return b"not a checkpoint"
    raise AssertionError(how)


@pytest.mark.parametrize(
    "how", ["empty", "half", "longer", "zeros", "flipped bit", "changed state", "no metadata", "text"]
)
def test_damaged_file_is_skipped_with_a_warning(tmp_path, caplog, how):
    save_checkpoint(tmp_path, 1, at(1), {"epoch": 1})
    save_checkpoint(tmp_path, 2, at(2), {"epoch": 1})
    newest = tmp_path / "step-00000002.safetensors"
    data = newest.read_bytes()
    newest.write_bytes(damage(data, how))
    assert newest.read_bytes() != data
    with caplog.at_level(logging.WARNING):
        assert_same(load_checkpoint(tmp_path), 1, at(1), {"epoch": 1})
    assert "step-00000002.safetensors is damaged and skipped" in caplog.text
    (tmp_path / "step-00000001.safetensors").unlink()
    assert load_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, 2, at(2), {})
    assert_same(load_checkpoint(tmp_path), 2, at(2), {})


def test_unreadable_file_is_skipped(tmp_path):
    save_checkpoint(tmp_path, 1, at(1), {})
    (tmp_path / "step-00000009.safetensors").mkdir()
    assert_same(load_checkpoint(tmp_path), 1, at(1), {})


def prepared(tmp_path: Path) -> Path:
    directory = tmp_path / "run" / "checkpoints"
    shutil.rmtree(directory.parent, ignore_errors=True)
    for step in (1, 2):
        save_checkpoint(directory, step, at(step), {"epoch": step})
    return directory


def operations_of_a_save(tmp_path: Path) -> list[str]:
    directory = prepared(tmp_path)
    with broken(tmp_path, 0, "before") as seen:
        save_checkpoint(directory, 3, at(3), {"epoch": 3})
    return seen


def test_operations_that_the_tests_break(tmp_path):
    kinds = [entry.split()[0] for entry in operations_of_a_save(tmp_path)]
    assert kinds == ["write", "fsync", "replace", "fsync", "unlink"]


@pytest.mark.parametrize("how", KILLS)
def test_killed_at_any_file_operation(tmp_path, how):
    for number, operation in enumerate(operations_of_a_save(tmp_path), 1):
        directory = prepared(tmp_path)

        def save(directory=directory, number=number):
            with broken(tmp_path, number, how):
                save_checkpoint(directory, 3, at(3), {"epoch": 3})

        assert in_child(save) == 9, operation
        found = load_checkpoint(directory)
        assert found and found.step in (2, 3), operation
        assert_same(found, found.step, at(found.step), {"epoch": found.step})
        # the run that continues gets the same content, and leaves no litter
        save_checkpoint(directory, 3, at(3), {"epoch": 3})
        assert_same(load_checkpoint(directory), 3, at(3), {"epoch": 3})
        assert sorted(p.name for p in directory.iterdir()) == [
            "step-00000002.safetensors",
            "step-00000003.safetensors",
        ], operation


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_disk_error_at_any_file_operation(tmp_path, error):
    for number, operation in enumerate(operations_of_a_save(tmp_path), 1):
        directory = prepared(tmp_path)
        with broken(tmp_path, number, error):
            if operation.startswith("unlink"):  # the checkpoint is durable: an old one that stays is no error
                save_checkpoint(directory, 3, at(3), {"epoch": 3})
            else:
                with pytest.raises(OSError) as raised:
                    save_checkpoint(directory, 3, at(3), {"epoch": 3})
                assert raised.value.errno == error
        found = load_checkpoint(directory)
        assert found and found.step in (2, 3), operation
        assert_same(found, found.step, at(found.step), {"epoch": found.step})
        assert not [p for p in directory.iterdir() if p.suffix == ".tmp"], operation


TRAINING = """
import sys, uuid
from pathlib import Path
import torch
from ml_assets.artifacts import write_atomic
from ml_assets.engine.checkpoint import load_checkpoint, save_checkpoint

uuid.uuid4 = lambda: uuid.UUID(int=1)  # the tool compares the file operations of two runs by name
out = Path(sys.argv[1])
torch.manual_seed(0)
weight, momentum, start = torch.randn(64, 8).to(torch.bfloat16), torch.zeros(64, 8), 0
if found := load_checkpoint(out):
    weight, momentum, start = found.tensors["weight"], found.tensors["momentum"], found.step
    torch.set_rng_state(found.tensors["rng"])
print("resumed from step", start)
for step in range(start + 1, 7):
    momentum = momentum * 0.9 + torch.randn(64, 8)
    weight = (weight - 0.01 * momentum).to(torch.bfloat16)
    if step % 2 == 0:
        tensors = {"weight": weight, "momentum": momentum, "rng": torch.get_rng_state()}
        save_checkpoint(out, step, tensors, {"epoch": step / 6})
write_atomic(out / "final.bin", weight.view(torch.uint8).numpy().tobytes())
"""


@pytest.mark.slow
def test_ckpt_chaos_passes_every_kill_point(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TRAINING)
    command = [
        sys.executable,
        "-m",
        "ckpt_chaos",
        "run",
        "--work",
        str(tmp_path / "work"),
        "--max-points",
        "1000",
    ]
    command += ["--modes", "before,torn,unsynced", "--step-regex", r"resumed from step (\d+)"]
    command += ["--checkpoint-glob", "{out}/step-*.safetensors", "--result-file", "{out}/final.bin"]
    command += [
        "--fail-on",
        "HARD_FAIL,SILENT_DIVERGENCE,LOST_WORK",
        "--",
        sys.executable,
        str(script),
        "{out}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = re.findall(r"^(PASS|HARD_FAIL|SILENT_DIVERGENCE|LOST_WORK): (\d+)$", done.stdout, re.MULTILINE)
    assert [name for name, _ in verdicts] == ["PASS"] and int(verdicts[0][1]) > 20, done.stdout
    assert "DRIFT" not in done.stdout, done.stdout
