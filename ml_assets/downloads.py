"""Wheels fetched by requirement, once, into `Settings.downloads`."""

import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from filelock import FileLock
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from ml_assets.artifacts import canonical_json, read_json, sha256_bytes, write_atomic
from ml_assets.settings import Settings

INDEX_SECONDS = 900.0
"""Between two questions to the package index about the same requirement."""
_PINNED = re.compile(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!+_-]+)")


class DownloadError(Exception):
    """A requirement that could not be downloaded; the message gives pip's reason."""


def find_wheel(requirement: str, settings: Settings) -> Path | None:
    """The wheel of a requirement `name==version` in `settings.downloads`, or None."""
    name, version = _parse(requirement)
    for path in sorted(settings.downloads.glob("*.whl")):
        try:
            found_name, found_version, _, _ = parse_wheel_filename(path.name)
        except InvalidWheelFilename:
            continue
        if found_name == name and found_version == version:
            return path
    return None


def wheel(requirement: str, settings: Settings) -> Path:
    """The wheel of a requirement `name==version`, downloaded by pip without its dependencies unless it is in
    `settings.downloads` already (where it can also be put by hand).

    Several processes may ask at once: one downloads, and none sees half a file. Raises DownloadError with
    pip's reason, ValueError when the requirement has another form.
    """
    found = find_wheel(requirement, settings)
    if found is not None:
        return found
    settings.downloads.mkdir(parents=True, exist_ok=True)
    name, version = _parse(requirement)
    with FileLock(settings.downloads / f".{name}-{version}.lock"):
        found = find_wheel(requirement, settings)
        return found or _download(requirement, settings.downloads)


def newest(requirement: str, settings: Settings, every: float = INDEX_SECONDS) -> str:
    """The pinned requirement `name==version` of the newest release that fits a requirement such as
    `name>=1.2,<2`; no release candidates. A pinned one is given back as it is.

    The index is asked again after `every` seconds. Raises DownloadError with pip's reason or when nothing
    fits, ValueError when the requirement has another form.
    """
    if _PINNED.fullmatch(requirement):
        return requirement
    try:
        wanted = Requirement(requirement)
    except InvalidRequirement as error:
        raise ValueError(f"{requirement!r}: expected a requirement such as 'name>=1.2,<2'") from error
    note = settings.downloads / f".newest-{sha256_bytes(requirement.encode())[:16]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError):
        if time.time() - note.stat().st_mtime < every:
            return str(read_json(note)["pinned"])
    found = sorted(wanted.specifier.filter(_released(wanted.name)), key=Version)
    if not found:
        raise DownloadError(f"{requirement}: no release of {wanted.name} fits")
    pinned = f"{wanted.name}=={found[-1]}"
    write_atomic(note, canonical_json({"requirement": requirement, "pinned": pinned}))
    return pinned


def _released(name: str) -> list[str]:
    """All versions of which the package index has a wheel for this machine."""
    options = ["--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "index", "versions", *options, name]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    match = re.search(r"^Available versions: (.+)$", result.stdout, re.MULTILINE)
    if result.returncode != 0 or match is None:
        raise DownloadError(f"{name}: its releases cannot be listed: {_reason(result)}")
    return [version.strip() for version in match[1].split(",")]


def _reason(result: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines[-3:]
    return " ".join(dict.fromkeys(errors)) or f"pip ended with code {result.returncode}"


def _download(requirement: str, downloads: Path) -> Path:
    temporary = Path(tempfile.mkdtemp(prefix=".pip-", dir=downloads))
    try:
        # wheels only: building a source distribution would run its code
        options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "download", *options, "--progress-bar", "off", "-q"]
        result = subprocess.run(
            [*command, "--dest", str(temporary), requirement], capture_output=True, text=True, check=False
        )
        wheels = list(temporary.glob("*.whl"))
        if result.returncode != 0 or len(wheels) != 1:
            raise DownloadError(f"{requirement}: cannot be downloaded: {_reason(result)}")
        return wheels[0].replace(downloads / wheels[0].name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _parse(requirement: str) -> tuple[str, Version]:
    match = _PINNED.fullmatch(requirement)
    try:
        if match is not None:
            return canonicalize_name(match[1]), Version(match[2])
    except InvalidVersion:
        pass
    raise ValueError(f"{requirement!r}: expected a pinned requirement such as 'name==1.2.3'")
