"""What this machine computes with: device, threads, number format; and its name in manifests.

The number format is measured, not assumed: bfloat16 products are twice as fast as float32 on some CPUs that
have the instructions, and half as fast on others.
"""

import contextlib
import ctypes
import fcntl
import functools
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock

from ml_assets.artifacts import write_atomic
from ml_assets.settings import Settings

BFLOAT16_ADVANTAGE = 1.2
"""bfloat16 is used where its matrix products are at least this many times as fast as float32's."""


DEVICE_LOCK = "device.lock"


def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def threads() -> int:
    """Cores that this process may use: its affinity, the control group's quota, and EVERGREEN_THREADS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists():
        limit, period = quota.read_text().split()
        if limit != "max":
            cores = min(cores, max(1, int(limit) // int(period)))
    wanted = os.environ.get("EVERGREEN_THREADS", "")
    if not wanted:
        return cores
    if not wanted.isdigit() or int(wanted) < 1:
        raise ValueError(f"EVERGREEN_THREADS={wanted!r}: expected a number of threads from 1")
    return min(cores, int(wanted))


def prepare_process() -> None:
    """Set threads and allocator for a process that computes. Call once before the first tensor."""
    torch.set_num_threads(threads())
    torch.use_deterministic_algorithms(True, warn_only=True)
    # 4% of a training step; nothing reads it
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        # By default glibc maps and unmaps every tensor of more than 128 kB, and the page faults take a third
        # of a training step. Keep freed memory in the process instead.
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_top_pad, 2**26)


def use_threads(count: int) -> None:
    """Compute with this many threads from now on, in the calling thread."""
    torch.set_num_threads(count)  # also when it seems so already: MKL's number is that of the whole process
    # When torch is first asked for it in a thread, it takes the number that any thread set last.
    torch.get_num_threads()


def compute_alone() -> None:
    """Let the calling thread compute with itself alone, so that another one can use all cores.

    Each thread that computes with several has OpenMP threads of its own. As soon as there are more of all of
    them together than cores, libgomp lets them sleep at every barrier, and waking them takes longer than most
    products of a decoding step: with two such threads it took two to three times as long.
    """
    use_threads(1)


@contextlib.contextmanager
def computing(home: Path) -> Iterator[None]:
    """Inside, this process computes with all of its threads, and others can see it: see `neighbours`."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / DEVICE_LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # released when the process ends, however it ends
        yield


def neighbours(home: Path) -> bool:
    """Whether another process of this deployment is known to compute now."""
    try:
        with (home / DEVICE_LOCK).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such directory, no file descriptor left: only speed depends on it
        return False
    return False


def compute_dtype(home: Path | None = None) -> torch.dtype:
    """bfloat16 or float32, whichever multiplies faster here: measured once and kept in
    `<home>/hardware.json`, so that later runs use the same and give the same bytes. EVERGREEN_DTYPE names one
    instead, for machines of several kinds that are to give the same adapters.

    Raises ValueError when EVERGREEN_DTYPE is neither.
    """
    wanted = os.environ.get("EVERGREEN_DTYPE", "")
    if wanted not in ("", "bfloat16", "float32"):
        raise ValueError(f"EVERGREEN_DTYPE={wanted!r}: expected bfloat16 or float32")
    return getattr(torch, wanted or _measured_dtype(str(home or Settings.from_env().home)))


@functools.cache
def _measured_dtype(home: str) -> str:
    if device().type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    path = Path(home) / "hardware.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    key = _processor()
    with FileLock(f"{path}.lock"):
        known = json.loads(path.read_text()) if path.exists() else {}
        if key not in known:
            torch.set_num_threads(threads())
            rates = matmul_rates()
            fast = rates["bfloat16"] >= BFLOAT16_ADVANTAGE * rates["float32"]
            known[key] = {"dtype": "bfloat16" if fast else "float32", "gigaflops": rates}
            write_atomic(path, json.dumps(known, indent=1).encode())
    return known[key]["dtype"]


def matmul_rates(rounds: int = 5) -> dict[str, float]:
    """Median GFLOP/s of a linear layer's product (1024 x 576 by 576 x 1536) in float32 and bfloat16,
    measured in turns so that other load hits both alike."""
    seconds: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    for _ in range(rounds + 1):  # the first round warms up
        for name, times in seconds.items():
            a = torch.ones(1024, 576, dtype=getattr(torch, name))
            b = torch.ones(1536, 576, dtype=getattr(torch, name))
            start = time.perf_counter()
            for _ in range(10):
                torch.nn.functional.linear(a, b)
            times.append(time.perf_counter() - start)
    work = 10 * 2 * 1024 * 576 * 1536 / 1e9
    return {name: round(work / sorted(times[1:])[rounds // 2], 1) for name, times in seconds.items()}


def hardware_class(home: Path | None = None) -> str:
    """Names what must be equal for two trainings to give the same bytes: processor, threads, number format
    and torch build."""
    dtype = str(compute_dtype(home)).removeprefix("torch.")
    return f"{_processor()}, {dtype}"


@functools.cache
def _processor() -> str:
    if device().type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().split("\n\n")[0].splitlines()
        pairs = [line.partition(":") for line in lines]
        facts = {name.strip(): value.strip() for name, _, value in pairs}
        name = facts.get("model name", model)
        family = [facts[k] for k in ("cpu family", "model", "stepping") if k in facts]
        model = f"{name} {'-'.join(family)}".strip()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{model}, {capability}, {threads()} threads, torch {torch.__version__}"
