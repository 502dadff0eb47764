"""Finds what is wrong with a defs.yaml, and says it in one line: file, line, field, what was expected.

Nothing here imports Dagster, reads a data set or imports a user's module.
"""

import ast
import difflib
import importlib.machinery
import json
import os
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from yaml.constructor import SafeConstructor

from ml_assets.spec import PATTERN_WORDS, SHAPES

Steps = tuple[str | int, ...]
M = TypeVar("M", bound=BaseModel)
ENV = re.compile(r"\{\{\s*env\.([A-Za-z_]\w*)\s*\}\}")
OTHER_ENV = re.compile(r"\{\{-?\s*env\b[^}]*\}*")


class SpecError(Exception):
    """One or more mistakes in the files of a project, one line each:
    `path/defs.yaml:17: prompt.user: what was found and what was expected`."""


@dataclass(frozen=True)
class Mistake:
    """What is wrong with the value at `steps` (keys and indices below the block of the YAML)."""

    steps: Steps
    message: str


@dataclass(frozen=True)
class Origin:
    """The file that a block was read from, and the line of each of its keys and list items."""

    file: Path
    line: int = 1
    lines: Mapping[Steps, int] = field(default_factory=dict)

    def line_of(self, steps: Steps) -> int:
        """Line of the value, or of the closest block around it."""
        closest = (self.lines[steps[:n]] for n in range(len(steps), 0, -1) if steps[:n] in self.lines)
        return next(closest, self.line)

    def at(self, steps: Steps = ()) -> str:
        """`file:line`; the file relative to the working directory when it is below it."""
        file = os.path.relpath(self.file)
        return f"{self.file if file.startswith('..') else file}:{self.line_of(steps)}"

    def error(self, mistakes: Iterable[Mistake]) -> SpecError:
        """The exception that states all of them, in the order of the file."""
        return SpecError(
            "\n".join(
                f"{self.at(m.steps)}: {'.'.join(map(str, m.steps)) + ': ' if m.steps else ''}{m.message}"
                for m in sorted(mistakes, key=lambda m: self.line_of(m.steps))
            )
        )


def did_you_mean(found: object, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing when no known word is close."""
    close = difflib.get_close_matches(str(found), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


# -- the file ------------------------------------------------------------------------------------------

FILE_NAMES = {"defs.yaml", "defs.yml"}
TYPES = ("ml_assets.BaseModels", "ml_assets.Customization")
# not `template_vars_module`: the attributes are no Jinja, so that it would do nothing
FILE_FIELDS = ("type", "attributes", "requirements", "post_processing")
DEEPEST = 50
"""Levels of a file that are read: some hundred end the interpreter's stack."""
ARGUMENTS: Steps = ("attributes", "source", "args")
"""Below it stands what a user's function gets, with any keys."""
TEXT, MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


def check_files(folder: Path) -> None:
    """Raises SpecError for what is wrong with the YAML files below `folder` before any block is validated:
    syntax, fields given twice (YAML silently takes the last), unquoted templates, an unknown type, fields
    beside `attributes`."""
    files = sorted(file for file in folder.rglob("*") if file.name in FILE_NAMES)
    if lines := [
        str(Origin(file, line).error([mistake])) for file in files for line, mistake in _in_file(file)
    ]:
        raise SpecError("\n".join(lines))


def _in_file(file: Path) -> Iterator[tuple[int, Mistake]]:
    try:
        documents = [
            node for node in yaml.compose_all(file.read_text(encoding="utf-8"), yaml.CSafeLoader) if node
        ]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        yield (
            (mark.line + 1 if mark else 1),
            Mistake((), f"not valid YAML: {error.context or ''} {error.problem}"),
        )
        return
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        yield 1, Mistake((), f"not valid YAML: {error}")
        return
    nothing = Mistake((), "expected the fields 'type' and 'attributes'")
    if not documents:
        yield 1, nothing
    for document in documents:
        wrong = list(_in_node(document, (), (), set()))
        yield from wrong
        if not wrong:
            yield from _in_fields(document) if isinstance(document, yaml.MappingNode) else [(1, nothing)]


def _in_fields(document: yaml.MappingNode) -> Iterator[tuple[int, Mistake]]:
    types = [value for key, value in document.value if key.value == "type"]
    expected = f"expected one of: {', '.join(TYPES)}"
    if not types:
        yield document.start_mark.line + 1, Mistake(("type",), f"required field is missing; {expected}")
    elif not isinstance(types[0], yaml.ScalarNode) or types[0].value not in TYPES:
        found = types[0].value if types[0].tag == TEXT else ""
        if not found or _is_ours_or_nowhere(found):
            found = f"found {found!r}{did_you_mean(found, TYPES)}" if found else "found none"
            yield types[0].start_mark.line + 1, Mistake(("type",), f"{expected}; {found}")
        return  # what may stand in the file of another component, Dagster says
    for key, value in document.value:
        line = key.start_mark.line + 1
        if key.value not in FILE_FIELDS:
            known = f"expected one of: {', '.join(FILE_FIELDS)}{did_you_mean(key.value, FILE_FIELDS)}"
            yield line, Mistake((key.value,), f"unknown field; {known}")
        elif key.value != "type" and not isinstance(value, yaml.MappingNode):
            yield line, Mistake((key.value,), "expected a block of fields")


def _is_ours_or_nowhere(type_name: str) -> bool:
    """Whether a type must be a misspelt one of this project: components of others may stand beside them."""
    module = type_name.rpartition(".")[0]
    if not module or module.split(".")[0] == "ml_assets" or did_you_mean(type_name, TYPES):
        return True
    return isinstance(_find_module(module), str)


def _in_node(
    node: yaml.Node, steps: Steps, around: tuple[int, ...], seen: set[int]
) -> Iterator[tuple[int, Mistake]]:
    """`around`: the nodes that this one is in. What an alias stands for is looked at once (`seen`)."""
    line = node.start_mark.line + 1
    if id(node) in around:
        yield line, Mistake(steps, "expected an alias of something else, found one of what it is in")
    elif len(around) == DEEPEST:
        yield line, Mistake(steps[:4], f"expected at most {DEEPEST} levels of blocks and lists")
    elif id(node) not in seen:
        seen.add(id(node))
        around = (*around, id(node))
        if wrong := _wrong_value(node):
            yield line, Mistake(steps, wrong)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                yield from _in_node(item, (*steps, index), around, seen)
        elif isinstance(node, yaml.MappingNode):
            yield from _in_mapping(node, steps, around, seen)


def _in_mapping(
    node: yaml.MappingNode, steps: Steps, around: tuple[int, ...], seen: set[int]
) -> Iterator[tuple[int, Mistake]]:
    first: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            yield line, Mistake(steps, "expected text; quote a value that starts with a brace")
            return
        if key.tag not in (TEXT, MERGE) and not (len(steps) > 3 and steps[:3] == ARGUMENTS):
            yield line, Mistake(steps, f"expected text as the name of a field, found {key.value}; quote it")
        if key.value in first:
            yield line, Mistake((*steps, key.value), f"given twice; first in line {first[key.value]}")
        first.setdefault(key.value, line)
        yield from _in_node(value, (*steps, key.value), around, seen)


def _wrong_value(node: yaml.Node) -> str | None:
    """Why Dagster could not read a value: YAML's own types only, and such that Python can hold."""
    if node.tag not in yaml.SafeLoader.yaml_constructors:
        return f"unknown tag {node.tag.replace('tag:yaml.org,2002:', '!!')}; quote what is text"
    if isinstance(node, yaml.ScalarNode) and node.tag != TEXT:
        try:
            SafeConstructor().construct_object(node)
        except (ValueError, yaml.YAMLError) as error:
            return f"not a value that can be read: {error}"
    return None


# -- the model -----------------------------------------------------------------------------------------


def validate(model: type[M], attributes: Mapping[str, Any], origin: Origin) -> M:
    """Fill in `{{ env.NAME }}` in every string, then validate. Raises SpecError that states every mistake."""
    mistakes: list[Mistake] = []
    resolved = _resolve(attributes, (), mistakes)
    if mistakes:
        raise origin.error(mistakes)
    try:
        return model.model_validate(resolved)
    except ValidationError as error:
        raise origin.error(_explain(model, error)) from None


def _resolve(value: Any, steps: Steps, mistakes: list[Mistake]) -> Any:
    # Not Jinja: a prompt may hold any braces, and Jinja's native templates turn the text "007" into a number.
    match value:
        case str():

            def variable(match: re.Match[str]) -> str:
                name = match.group(1)
                if name not in os.environ:
                    mistakes.append(Mistake(steps, f"environment variable {name} is not set"))
                return os.environ.get(name, "")

            # in a prompt doubled braces are braces
            if steps[:1] != ("prompt",) and (other := OTHER_ENV.search(ENV.sub("", value))):
                mistakes.append(Mistake(steps, f"expected '{{{{ env.NAME }}}}', found {other.group()!r}"))
            return ENV.sub(variable, value)
        case dict():
            return {key: _resolve(item, (*steps, key), mistakes) for key, item in value.items()}
        case list():
            return [_resolve(item, (*steps, index), mistakes) for index, item in enumerate(value)]
    return value


def _explain(model: type[BaseModel], error: ValidationError) -> list[Mistake]:
    """One mistake for each wrong place."""
    mistakes: dict[Steps, Mistake] = {}
    for item in error.errors():
        at = (int(part) if part.isdigit() else part for part in item.get("ctx", {}).get("at", "").split("."))
        steps, around, here = _walk(model, (*item["loc"], *(part for part in at if part != "")))
        if item["type"].startswith("union_tag"):
            steps = (*steps, "kind")
        mistakes.setdefault(steps, Mistake(steps, _words(item, steps, around, here)))
    return list(mistakes.values())


def _walk(
    model: type[BaseModel], location: Sequence[str | int]
) -> tuple[Steps, list[type[BaseModel]], list[type[BaseModel]]]:
    """Where an error is in the YAML (pydantic's location without the tags of unions), the blocks that could
    stand around it and those that could stand there."""
    blocks: list[type[BaseModel]] = [model]
    inside: list[type[BaseModel]] = []
    steps: list[str | int] = []
    for part in location:
        annotations = [b.model_fields[part].annotation for b in blocks if part in b.model_fields]
        tagged = [b for b in blocks if part in _kinds(b)]
        if annotations:
            inside, blocks = blocks, [b for a in annotations for b in _blocks_in(a)]
        elif tagged:
            blocks = tagged
            continue
        elif part in SHAPES:
            continue
        elif isinstance(part, str):
            inside = blocks
        steps.append(part)
    return tuple(steps), inside or [model], blocks


def _blocks_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [block for argument in typing.get_args(annotation) for block in _blocks_in(argument)]


def _kinds(block: type[BaseModel]) -> tuple[str, ...]:
    kind = block.model_fields.get("kind")
    return typing.get_args(kind.annotation) if kind else ()


def _words(item: Any, steps: Steps, around: list[type[BaseModel]], here: list[type[BaseModel]]) -> str:
    found, context = item["input"], item.get("ctx", {})
    fields = {name: info for block in around for name, info in block.model_fields.items()}
    match item["type"]:
        case "extra_forbidden":
            return f"unknown field; expected one of: {', '.join(fields)}{did_you_mean(steps[-1], fields)}"
        case "missing":
            about = fields[str(steps[-1])].description if str(steps[-1]) in fields else None
            return f"required field is missing{f': {about}' if about else ''}"
        case "literal_error":
            known = re.findall(r"'([^']*)'", context["expected"])
            return f"expected {context['expected']}, found {_short(found)}{did_you_mean(found, known)}"
        case "union_tag_invalid" | "union_tag_not_found":
            known = [kind for block in here for kind in _kinds(block)]
            if "kind" not in found:
                return f"required field is missing; expected one of: {', '.join(known)}"
            return f"expected one of: {', '.join(known)}; found {_short(found['kind'])}" + did_you_mean(
                found["kind"], known
            )
        case "string_pattern_mismatch":
            return f"expected {PATTERN_WORDS[context['pattern']]}, found {_short(found)}"
        case "at_field":
            return item["msg"]
        case "value_error":
            return str(context["error"])
        case "model_type" | "model_attributes_type" | "dict_type":
            kinds = ", ".join(kind for block in here for kind in _kinds(block))
            with_kind = f" with a kind ({kinds})" if kinds else ""
            return f"expected a block of fields{with_kind}, found {_short(found)}"
        case "string_too_long":
            return f"expected at most {context['max_length']} characters, found {_short(found)}"
        case "too_short":
            return f"expected at least {context['min_length']} item, found {_short(found)}"
    return (
        f"{item['msg'].replace('Input should be', 'expected').replace('Input should', 'expected to')}, "
        + (f"found {_short(found)}")
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, bool | None) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# -- what it refers to ---------------------------------------------------------------------------------


def columns_mistakes(named: Mapping[Steps, Sequence[str]], available: Sequence[str]) -> list[Mistake]:
    """Columns that the file names and the source lacks. `named`: place in the YAML -> columns."""
    return [
        Mistake(
            steps,
            f"column {column!r} is not in the source; it has: {', '.join(available)}"
            + did_you_mean(column, available),
        )
        for steps, columns in named.items()
        for column in columns
        if column not in available
    ]


def must_pass_mistakes(path: Path, columns: Sequence[str], steps: Steps) -> list[Mistake]:
    """The first thing that is wrong with a JSONL file of rows that must have `columns`."""
    try:
        with path.open(encoding="utf-8") as file:
            rows = 0
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                rows += 1
                row = json.loads(line)
                if not isinstance(row, dict):
                    return [Mistake(steps, f"{path}:{number}: expected a JSON object, found {_short(row)}")]
                if missing := [column for column in columns if row.get(column) is None]:
                    return [Mistake(steps, f"{path}:{number}: column {missing[0]!r} is missing")]
        return [] if rows else [Mistake(steps, f"{path}: expected at least one row, found none")]
    except OSError as error:
        return [Mistake(steps, f"{path}: cannot be read: {error.strerror}")]
    except ValueError as error:
        return [Mistake(steps, f"{path}: expected one JSON object per line: {error}")]


def callable_mistakes(
    reference: str, steps: Steps, *, keywords: Iterable[str] | None = None, positional: int = 0
) -> list[Mistake]:
    """Is there a function `package.module:function` that takes these arguments?

    The module is found and parsed, never run: it may import anything. What can't be known from its text
    (a compiled module, a name from `import *`) passes.
    """
    module, name = reference.split(":")
    spec = _find_module(module)
    if isinstance(spec, str):
        return [Mistake(steps, f"{reference!r}: {spec}")]
    if not spec.origin or not spec.origin.endswith(".py"):
        return []
    try:
        tree = ast.parse(Path(spec.origin).read_bytes())
    except SyntaxError as error:
        return [Mistake(steps, f"{reference!r}: {spec.origin}:{error.lineno}: {error.msg}")]
    names, dynamic = _top_level(tree.body)
    if name not in names:
        if dynamic:
            return []
        public = sorted(n for n, node in names.items() if not n.startswith("_") and node is not None)
        return [
            Mistake(
                steps,
                f"{reference!r}: {spec.origin} defines no {name!r}"
                + (f"; it has: {', '.join(public)}{did_you_mean(name, public)}" if public else ""),
            )
        ]
    function = names[name]
    if not isinstance(function, ast.FunctionDef):  # a class, a call, an import: unknown until it is called
        return []
    wrong = _signature_mismatch(function, keywords, positional)
    return [Mistake(steps, f"{reference!r}: {wrong}")] if wrong else []


def _find_module(module: str) -> importlib.machinery.ModuleSpec | str:
    """The module's spec, or what is wrong."""
    path: Sequence[str] | None = None
    spec = None
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        # the finders themselves: `importlib.util.find_spec` would run the packages above the module
        found = (finder.find_spec(name, path) for finder in sys.meta_path if hasattr(finder, "find_spec"))
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None:
            return f"there is no module {name!r} on the Python path"
        path = list(spec.submodule_search_locations or [])
    assert spec is not None
    return spec


def _top_level(body: Sequence[ast.stmt]) -> tuple[dict[str, ast.stmt | None], bool]:
    """Names that a module defines (functions and classes with their node, others with None), and whether
    it may define more than its text shows."""
    names: dict[str, ast.stmt | None] = {}
    dynamic = False
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names[node.name] = node
                dynamic |= node.name == "__getattr__"
            case ast.Import() | ast.ImportFrom():
                for alias in node.names:
                    names[(alias.asname or alias.name).split(".")[0]] = None
                    dynamic |= alias.name == "*"
            case ast.Assign() | ast.AnnAssign():
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {n.id: None for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
            case ast.If() | ast.Try() | ast.With():
                for part in ("body", "orelse", "finalbody"):
                    inner, more = _top_level(getattr(node, part, []))
                    names, dynamic = inner | names, dynamic or more
                for handler in getattr(node, "handlers", []):
                    inner, more = _top_level(handler.body)
                    names, dynamic = inner | names, dynamic or more
    return names, dynamic


def _signature_mismatch(
    function: ast.FunctionDef, keywords: Iterable[str] | None, positional: int
) -> str | None:
    arguments = function.args
    by_position = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    required = by_position[: len(by_position) - len(arguments.defaults)]
    if keywords is not None:
        known = [a.arg for a in (*arguments.args, *arguments.kwonlyargs)]
        given = set(keywords)
        if arguments.kwarg is None:
            for name in sorted(given - set(known)):
                return f"it takes no argument {name!r}; it takes: {', '.join(known) or 'none'}" + (
                    did_you_mean(name, known)
                )
        keyword_only = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        needed = [*required, *(a.arg for a, default in keyword_only if default is None)]
        missing = [name for name in needed if name not in given]
        return f"its argument {missing[0]!r} is missing from 'args'" if missing else None
    if len(required) > positional or (arguments.vararg is None and len(by_position) < positional):
        return f"expected a function of {positional} arguments, found ({', '.join(by_position)})"
    return None
