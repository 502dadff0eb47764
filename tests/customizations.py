"""Writes small projects, as a user would: a package with a defs folder of YAML files and their data."""

import json
import random
import sys
import textwrap
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from ml_assets.definitions import build_definitions

COLOURS = ["red", "green", "blue", "white", "black", "yellow"]
THINGS = ["lamp", "door", "chair", "table", "window", "bottle", "shelf", "mirror", "carpet", "curtain"]
PLACES = ["kitchen", "hall", "garden", "office", "cellar"]


@dataclass(frozen=True)
class Project:
    """A project outside this repository: `root` holds pyproject.toml and the package."""

    root: Path
    package: str

    @classmethod
    def create(cls, root: Path) -> "Project":
        project = cls(root, f"project_{uuid.uuid4().hex[:8]}")
        project.defs.mkdir(parents=True)
        for folder in (project.defs, project.defs.parent):
            (folder / "__init__.py").write_text("")
        (project.defs.parent / "definitions.py").write_text(
            textwrap.dedent(
                """\
                from pathlib import Path

                import dagster as dg

                from ml_assets.definitions import build_definitions


                @dg.definitions
                def defs() -> dg.Definitions:
                    return build_definitions(Path(__file__).parent)
                """
            )
        )
        (root / "pyproject.toml").write_text(
            textwrap.dedent(
                f"""\
                [tool.dg]
                directory_type = "project"

                [tool.dg.project]
                root_module = "{project.package}"
                defs_module = "{project.package}.defs"
                code_location_target_module = "{project.package}.definitions"
                registry_modules = ["ml_assets"]
                """
            )
        )
        return project

    @property
    def defs(self) -> Path:
        return self.root / self.package / "defs"

    def write(self, folder: str, text: str, rows: Iterable[Mapping[str, Any]] | None = None) -> Path:
        """Write `<defs>/<folder>/defs.yaml`, and `rows.jsonl` beside it. Gives the path of the YAML."""
        file = self.defs / folder / "defs.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        if rows is not None:
            (file.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    def definitions(self) -> dg.Definitions:
        """Load the project as its code location does."""
        if str(self.root) not in sys.path:
            sys.path.insert(0, str(self.root))
        return build_definitions(self.defs.parent)


def colour_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Distinct rows `the red lamp of the hall` -> `red`: a task that a tiny model can learn."""
    every = [
        {"text": f"the {colour} {thing} of the {place} number {number}", "colour": colour, "place": place}
        for colour in COLOURS
        for thing in THINGS
        for place in PLACES
        for number in range(10)
    ]
    return random.Random(seed).sample(every, count)


def base_models_yaml(families: Mapping[str, Path]) -> str:
    """A defs.yaml of ml_assets.BaseModels over local directories."""
    return "type: ml_assets.BaseModels\nattributes:\n  families:\n" + "".join(
        f"    - name: {name}\n      source: {{kind: directory, path: {path}}}\n"
        for name, path in families.items()
    )


COLOURS_YAML = """\
type: ml_assets.Customization
attributes:
  name: colours
  owners: [team:shop]
  source:
    kind: jsonl
    path: rows.jsonl
  prompt:
    user: "{text}"
    target: "{colour}"
  base_models: [tiny]
  evaluation:
    task: classification
"""
