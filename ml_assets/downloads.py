"""Wheels fetched by requirement, once, into `Settings.downloads`."""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from ml_assets.settings import Settings


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
            lines = [line for line in result.stderr.splitlines() if line.strip()]
            errors = [line for line in lines if line.startswith("ERROR:")] or lines[-3:]
            reason = " ".join(dict.fromkeys(errors)) or f"pip ended with code {result.returncode}"
            raise DownloadError(f"{requirement}: cannot be downloaded: {reason}")
        return wheels[0].replace(downloads / wheels[0].name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _parse(requirement: str) -> tuple[str, Version]:
    match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!+_-]+)", requirement)
    try:
        if match is not None:
            return canonicalize_name(match[1]), Version(match[2])
    except InvalidVersion:
        pass
    raise ValueError(f"{requirement!r}: expected a pinned requirement such as 'name==1.2.3'")
