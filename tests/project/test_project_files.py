"""The files around the code agree with each other and with what reads them."""

import re
import shutil
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from dagster import DagsterInstance
from dagster_cloud_cli.config.models import load_dagster_cloud_yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ml_assets.spec import BaseModelsSpec, CustomizationSpec

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = ("requirements.lock", "requirements-dev.lock")


def locked(*names: str) -> dict[str, str]:
    lines = [line for name in names for line in (ROOT / name).read_text().splitlines()]
    pins = [re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!_-]+)", line) for line in lines]
    assert all(pins), f"not a pin: {[line for line, pin in zip(lines, pins, strict=True) if not pin]}"
    result = {canonicalize_name(pin[1]): pin[2] for pin in pins if pin}
    assert len(result) == len(lines), "a package is pinned twice"
    return result


def requirements(*groups: list[str]) -> list[Requirement]:
    return [Requirement(text) for group in groups for text in group]


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (LOCKS[:1], PROJECT["project"]["dependencies"]),
        (LOCKS, PROJECT["project"]["dependencies"] + PROJECT["dependency-groups"]["dev"]),
    ],
)
def test_the_lock_pins_every_dependency_and_theirs(files, wanted):
    pins = locked(*files)
    todo, seen = requirements(wanted), set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not in {files}"
        assert requirement.specifier.contains(pins[name], prereleases=True), f"{requirement}: {pins[name]}"
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            todo += [
                dependency
                for dependency in requirements(metadata.requires(name) or [])
                if (dependency.marker is None or dependency.marker.evaluate({"extra": extra}))
                # torch for graphics cards brings these; the lock leaves the build of torch open
                and not re.match(r"nvidia|cuda|triton", dependency.name)
            ]


def test_the_lock_runs_on_machines_without_a_graphics_card():
    assert locked(LOCKS[0])["torch"] == "2.13.0"
    assert not [name for name in locked(*LOCKS) if re.match(r"nvidia|cuda|triton", name)]


def test_the_workspace_and_dg_load_the_same_module():
    project = PROJECT["tool"]["dg"]["project"]
    (location,) = yaml.safe_load((ROOT / "workspace.yaml").read_text())["load_from"]
    assert location["python_module"]["module_name"] == project["code_location_target_module"]
    assert location["python_module"]["location_name"] == project["code_location_name"]


def test_dagster_plus_reads_its_file_and_loads_the_same_module():
    project = PROJECT["tool"]["dg"]["project"]
    (location,) = load_dagster_cloud_yaml((ROOT / "dagster_cloud.yaml").read_text()).locations
    assert location.location_name == project["code_location_name"]
    assert location.code_source.module_name == project["code_location_target_module"]


def test_the_instance_is_what_the_project_needs(tmp_path):
    shutil.copy(ROOT / "dagster.yaml", tmp_path)
    with DagsterInstance.from_config(str(tmp_path)) as instance:
        concurrency = instance.get_concurrency_config()
        assert not instance.telemetry_enabled
        assert not instance.nux_enabled
        assert instance.run_monitoring_enabled
        assert instance.run_launcher.supports_check_run_worker_health
        assert instance.run_retries_enabled
        assert not instance.run_retries_retry_on_asset_or_op_failure
        assert concurrency.pool_config.default_pool_limit == 1
        assert concurrency.run_queue_config.max_concurrent_runs == 4
        assert "root" not in instance.managed_python_loggers
        assert Path(instance.root_directory) == tmp_path


def test_every_make_target_is_listed_with_what_it_does():
    phony = " ".join(re.findall(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.M)).split()
    listing = subprocess.run(
        ["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[0] for line in listing.splitlines()} == set(phony)


def test_setup_says_what_is_missing(tmp_path):
    result = subprocess.run(
        ["make", "setup", "PYTHON=", f"VENV={tmp_path / 'venv'}"],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "no Python 3.11 or newer found" in result.stderr


def test_the_ci_script_is_a_program():
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=True)


def test_the_files_in_the_readme_are_what_a_defs_yaml_may_say():
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    documents = [yaml.safe_load(block) for block in blocks]
    specs = {"ml_assets.Customization": CustomizationSpec, "ml_assets.BaseModels": BaseModelsSpec}
    assert {document["type"] for document in documents} == set(specs)
    for document in documents:
        specs[document["type"]].model_validate(document["attributes"])
    customization = next(block for block in blocks if "Customization" in block)
    assert len(customization.splitlines()) < 20


def test_links_in_the_documents_lead_somewhere():
    for document in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
