"""Prints docs/customization.md: `python -m ml_assets.cli.reference > docs/customization.md`."""

import inspect
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ml_assets.spec import PATTERN_WORDS, BaseModelsSpec, CustomizationSpec

HEADER = """\
# What a `defs.yaml` may say

Written by `python -m ml_assets.cli.reference`; a test keeps it equal to `ml_assets/spec.py`.

`dg scaffold defs ml_assets.Customization my_model` writes `ml_assets/defs/my_model/defs.yaml` with the fields
that have no default. Edit it, then run `dg check defs`: a mistake is told with file, line, field and what was
expected.

- `{{ env.NAME }}` in any text is replaced by that environment variable.
- In prompts, `{column}` stands for a column of the source; write `{{` and `}}` for braces.
- Relative paths start at the folder of the `defs.yaml`.
- A Python callable is named `package.module:function` and must be importable where Dagster runs. It is not
  imported when definitions load.
- `dg check yaml` looks at the shape of one file for each component type only; `dg check defs` checks all.
"""


def reference() -> str:
    """The page, in Markdown."""
    parts = [HEADER]
    for component, model in (("BaseModels", BaseModelsSpec), ("Customization", CustomizationSpec)):
        parts += [f"## `ml_assets.{component}`\n", *_blocks(model, "")]
    return "\n".join(parts)


def _blocks(model: type[BaseModel], path: str) -> Iterator[str]:
    """The table of a block, then those of the blocks in it."""
    heading = [f"### `{path}`" + _kind(model)] if path else []
    about = inspect.cleandoc(model.__doc__ or "")
    rows = [
        f"| `{name}` | {_type(info)} | {_default(info)} | {info.description or ''} |"
        for name, info in model.model_fields.items()
    ]
    table = ["| field | type | default | meaning |", "| --- | --- | --- | --- |", *rows]
    yield "\n".join([*(f"{line}\n" for line in (*heading, about)), *table, ""])
    for name, info in model.model_fields.items():
        for block in _models_in(info.annotation):
            yield from _blocks(block, f"{path}.{name}" if path else name)


def _kind(model: type[BaseModel]) -> str:
    kind = model.model_fields.get("kind")
    return f" with kind {_words(kind.annotation)}" if kind and kind.is_required() else ""


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]


def _type(info: FieldInfo) -> str:
    limits = [_limit(item) for item in info.metadata]
    return ", ".join([_words(info.annotation), *(limit for limit in limits if limit)])


def _words(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is typing.Annotated:
        return _words(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(a) for a in arguments if a is not types.NoneType))
    if origin is list:
        return f"list of {_words(arguments[0]).replace(' or ', ', ')}"
    if origin is dict:
        return "fields"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "block"
    return {str: "text", int: "whole number", float: "number"}[annotation]


def _limit(item: Any) -> str | None:
    for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
        if (bound := getattr(item, name, None)) is not None:
            return f"{sign} {bound:g}"
    if pattern := getattr(item, "pattern", None):
        return PATTERN_WORDS[pattern]
    if least := getattr(item, "min_length", None):
        return f"at least {least}"
    return None


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "**required**"
    value = info.get_default(call_default_factory=True)
    if value is None or value is PydanticUndefined or isinstance(value, BaseModel):
        return ""
    if isinstance(value, float):
        value = f"{value:g}"
    text = f"[{', '.join(value)}]" if isinstance(value, list) else ("{}" if value == {} else str(value))
    return f"`{text}`" if text else ""


if __name__ == "__main__":
    print(reference(), end="")
