"""The component as a user meets it: real files through the real loader and the `dg` program."""

import json
import os
import re
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import dagster as dg
import pytest
from customizations import COLOURS_YAML, Project, base_models_yaml, colour_rows

from ml_assets.customization import Customization, CustomizationScaffolder
from ml_assets.mistakes import SpecError
from ml_assets.settings import RUN_ASSETS_VARIABLE

REPOSITORY = Path(__file__).parent.parent
NAMES_OF_METRICS = "'exact_match', 'json_valid', 'json_field_f1', 'accuracy', 'macro_f1', 'chrf' or 'rouge_l'"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project.create(tmp_path)
    project.write("bases", base_models_yaml({"tiny": tmp_path / "tiny", "large": tmp_path / "large"}))
    project.write("colours", COLOURS_YAML, colour_rows(30))
    return project


def run_dg(project: Project, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(project.root), str(REPOSITORY)])
    return subprocess.run(
        [str(Path(sys.executable).parent / "dg"), *arguments],
        cwd=project.root,
        env=os.environ | {"PYTHONPATH": path, "COLUMNS": "200", "DAGSTER_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# what is replaced in COLOURS_YAML, by what, the line and the whole message that follows `file:line: `
MISTAKES = {
    "unknown field": (
        "  owners: [team:shop]",
        "  owner: [team:shop]",
        4,
        "owner: unknown field; expected one of: name, description, owners, source, dataset, prompt, "
        "base_models, adapter, examples, evaluation, freshness, endpoint, traffic, feedback, drift, "
        "maintenance, migration, schedules (did you mean 'owners'?)",
    ),
    "unknown field of a source": (
        "    path: rows.jsonl",
        "    pth: rows.jsonl\n    path: rows.jsonl",
        7,
        "source.pth: unknown field; expected one of: kind, path (did you mean 'path'?)",
    ),
    "unknown field of a nested block": (
        "    task: classification",
        "    task: classification\n    gate: {margn: 0.1}",
        14,
        "evaluation.gate.margn: unknown field; expected one of: margin, min_gain, alpha, power, "
        "max_negative_flips, max_forgetting (did you mean 'margin'?)",
    ),
    "missing field": (
        '    target: "{colour}"\n',
        "",
        8,
        "prompt.target: required field is missing: the answer to learn",
    ),
    "missing block": (
        '  prompt:\n    user: "{text}"\n    target: "{colour}"\n',
        "",
        2,
        "prompt: required field is missing: what the model is told and should answer",
    ),
    "wrong type": (
        "  evaluation:",
        "  adapter:\n    rank: four\n  evaluation:",
        13,
        "adapter.rank: expected a valid integer, unable to parse string as an integer, found 'four'",
    ),
    "a number out of range": (
        "  evaluation:",
        "  adapter:\n    dropout: 1.5\n  evaluation:",
        13,
        "adapter.dropout: expected less than 1, found 1.5",
    ),
    "a word that YAML takes for a boolean": (
        '    user: "{text}"',
        '    user: "{text}"\n    system: no',
        10,
        "prompt.system: expected no boolean, found false; quote words such as yes, no, on and off",
    ),
    "a block where text belongs": (
        '    user: "{text}"',
        "    user: {text}",
        9,
        "prompt.user: expected a valid string, found {'text': None}",
    ),
    "text where a block belongs": (
        "    kind: jsonl\n    path: rows.jsonl",
        "    rows.jsonl",
        5,
        "source: expected a block of fields with a kind (jsonl, csv, parquet, sql, huggingface, python), "
        "found 'rows.jsonl'",
    ),
    "unknown kind of source": (
        "kind: jsonl",
        "kind: json",
        6,
        "source.kind: expected one of: jsonl, csv, parquet, sql, huggingface, python; found 'json' "
        "(did you mean 'jsonl'?)",
    ),
    "no kind of source": (
        "    kind: jsonl\n",
        "",
        5,
        "source.kind: required field is missing; expected one of: jsonl, csv, parquet, sql, huggingface, "
        "python",
    ),
    "bad name": (
        "name: colours",
        "name: My Colours",
        3,
        "name: expected lower-case letters, digits and underscores, starting with a letter, "
        "found 'My Colours'",
    ),
    "reserved name": (
        "name: colours",
        "name: base_models",
        3,
        "name: expected another name: 'base_models' is used by the project itself",
    ),
    "bad owner": (
        "owners: [team:shop]",
        "owners:\n    - team:shop\n    - anna",
        6,
        "owners.1: expected 'team:<name>' or an e-mail address, found 'anna'",
    ),
    "an owner whose address Dagster does not take": (
        "owners: [team:shop]",
        "owners: [team:shop, anna.müller@firma.de]",
        4,
        "owners.1: expected 'team:<name>' or an e-mail address, found 'anna.müller@firma.de'",
    ),
    "an owner with half an address": (
        "owners: [team:shop]",
        "owners: [a@b.c]",
        4,
        "owners.0: expected 'team:<name>' or an e-mail address, found 'a@b.c'",
    ),
    "long name": (
        "name: colours",
        f"name: {'a' * 64}",
        3,
        f"name: expected at most 63 characters, found '{'a' * 56}...",
    ),
    "the name of a scope": (
        "name: colours",
        "name: admin",
        3,
        "name: expected another name: 'admin' is used by the project itself",
    ),
    "brace that does not close": (
        "{text}",
        "{text",
        9,
        "prompt.user: '{text': expected '}' before end of string; write '{{' and '}}' for literal braces",
    ),
    "no column in the prompt": (
        "{text}",
        "text",
        9,
        "prompt.user: expected at least one {column} of the source in 'text'",
    ),
    "column that the source lacks": (
        "{text}",
        "{txt}",
        9,
        "prompt.user: column 'txt' is not in the source; it has: text, colour, place (did you mean 'text'?)",
    ),
    "segment that the source lacks": (
        "    task: classification",
        "    task: classification\n    segments:\n      - place\n      - language",
        16,
        "evaluation.segments.1: column 'language' is not in the source; it has: text, colour, place",
    ),
    "group that the source lacks": (
        "  evaluation:",
        "  dataset: {group_by: plaice}\n  evaluation:",
        12,
        "dataset.group_by: column 'plaice' is not in the source; it has: text, colour, place "
        "(did you mean 'place'?)",
    ),
    "unknown base model": (
        "base_models: [tiny]",
        "base_models: [tiny, lagre]",
        11,
        "base_models.1: base model 'lagre' is not declared; the project declares: tiny, large "
        "(did you mean 'large'?)",
    ),
    "no base model": (
        "base_models: [tiny]",
        "base_models: []",
        11,
        "base_models: expected at least 1 item, found []",
    ),
    "gate that can't be passed": (
        "    task: classification",
        "    task: classification\n    max_rows: 100",
        14,
        "evaluation.max_rows: impossible gate: with max_rows 100 even a candidate that changes no answer "
        "can't be shown to stay within margin 0.02 at alpha 0.05; expected max_rows of at least 133, or a "
        "wider margin",
    ),
    "margin that no number of rows shows": (
        "    task: classification",
        "    task: classification\n    max_rows: null\n    gate: {margin: 5.0e-324}",
        15,
        "evaluation.gate.margin: expected greater than or equal to 0.000001, found 5e-324",
    ),
    "alpha that is no chance": (
        "    task: classification",
        "    task: classification\n    gate: {alpha: 1.0e-320}",
        14,
        "evaluation.gate.alpha: expected greater than or equal to 0.000001, found 1e-320",
    ),
    "value that rewards wrong answers": (
        "    task: classification",
        "    task: classification\n    value:\n      wrong: 2",
        15,
        "evaluation.value.wrong: expected a right answer to be worth more than a wrong one, found "
        "right: 1.0, wrong: 2.0",
    ),
    "unknown metric": (
        "    task: classification",
        "    task: classification\n    metrics: [acuracy]",
        14,
        f"evaluation.metrics.0: expected {NAMES_OF_METRICS}, found 'acuracy' (did you mean 'accuracy'?)",
    ),
    "metric that can't decide": (
        "    task: classification",
        "    task: classification\n    metrics: [macro_f1]",
        14,
        "evaluation.metrics.0: expected another metric before macro_f1: the first one decides row by row, "
        "and macro_f1 has no score for a row",
    ),
    "metric without a function": (
        "    task: classification",
        "    task: classification\n    metrics:\n      - callable: helpers.shouting:is_loud",
        15,
        "evaluation.metrics.0.callable: 'helpers.shouting:is_loud': there is no module 'helpers' on the "
        "Python path",
    ),
    "epochs and steps": (
        "  evaluation:",
        "  adapter:\n    epochs: 2\n    steps: 100\n  evaluation:",
        14,
        "adapter.steps: expected 'epochs' or 'steps', found both",
    ),
    "an adapter that the endpoint can't serve": (
        "  evaluation:",
        "  adapter: {kind: activated_lora}\n  endpoint: {engine: vllm}\n  evaluation:",
        12,
        "adapter.kind: expected lora or auto: endpoint.engine is vllm, which serves exact LoRA only; or "
        "serve it with endpoint.engine: in_process",
    ),
    "bad duration": (
        "  evaluation:",
        "  freshness: {dataset: daily}\n  evaluation:",
        12,
        "freshness.dataset: expected a duration such as '90m', '36h' or '7d', found 'daily'",
    ),
    "duration for ever": (
        "  evaluation:",
        "  freshness: {source: 99999999999d}\n  evaluation:",
        12,
        "freshness.source: expected at most 36500d, found '99999999999d'",
    ),
    "days for ever": (
        "  evaluation:",
        "  drift: {one_false_alarm_in: 36501d}\n  evaluation:",
        12,
        "drift.one_false_alarm_in: expected at most 36500d, found '36501d'",
    ),
    "cooldown for ever": (
        "  evaluation:",
        "  maintenance: {cooldown: 876001h}\n  evaluation:",
        12,
        "maintenance.cooldown: expected at most 36500d, found '876001h'",
    ),
    "a time that never comes": (
        "  evaluation:",
        "  schedules:\n    - {cron: 0 0 31 4 *, run: main}\n  evaluation:",
        13,
        "schedules.0.cron: expected a time that comes, found '0 0 31 4 *', which never fires",
    ),
    "a day that February lacks": (
        "  evaluation:",
        "  schedules:\n    - {cron: 0 0 30 2 *, run: main}\n  evaluation:",
        13,
        "schedules.0.cron: expected a time that comes, found '0 0 30 2 *', which never fires",
    ),
    "no cron expression": (
        "  evaluation:",
        "  schedules:\n    - {cron: 0 25 * * *, run: main}\n  evaluation:",
        13,
        "schedules.0.cron: expected a cron expression, found '0 25 * * *'",
    ),
    "a variable in Dagster's way": (
        "path: rows.jsonl",
        """path: "{{ env('HOME') }}/rows.jsonl\"""",
        7,
        "source.path: expected '{{ env.NAME }}', found \"{{ env('HOME') }}\"",
    ),
    "unset variable": (
        "path: rows.jsonl",
        'path: "{{ env.EVERGREEN_TEST_NOWHERE }}/rows.jsonl"',
        7,
        "source.path: environment variable EVERGREEN_TEST_NOWHERE is not set",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_with_file_line_and_expectation(project: Project, mistake: str) -> None:
    old, new, line, message = MISTAKES[mistake]
    assert old in COLOURS_YAML
    file = project.write("colours", COLOURS_YAML.replace(old, new, 1))
    with pytest.raises(SpecError) as error:
        project.definitions()
    assert str(error.value) == f"{file}:{line}: {message}"


FILES = {
    "syntax": (
        '{text}"',
        "{text}",
        10,
        "not valid YAML: while parsing a block mapping did not find expected key",
    ),
    "a tab": (
        "    path",
        "\tpath",
        7,
        "not valid YAML: while scanning a plain scalar found a tab character that violates indentation",
    ),
    "a field given twice": (
        "  evaluation:",
        "  name: other\n  evaluation:",
        12,
        "attributes.name: given twice; first in line 3",
    ),
    "a template without quotes": (
        "rows.jsonl",
        "{{ env.HOME }}",
        7,
        "attributes.source.path: expected text; quote a value that starts with a brace",
    ),
    "a field beside the attributes": (
        "attributes:",
        "atributes:",
        2,
        "atributes: unknown field; expected one of: type, attributes, requirements, post_processing "
        "(did you mean 'attributes'?)",
    ),
    "attributes that are no block": (
        COLOURS_YAML.partition("\n")[2],
        "attributes: [name]\n",
        2,
        "attributes: expected a block of fields",
    ),
    "no fields at all": (COLOURS_YAML, "colours\n", 1, "expected the fields 'type' and 'attributes'"),
    "an empty file": (COLOURS_YAML, "", 1, "expected the fields 'type' and 'attributes'"),
    "only a comment": (COLOURS_YAML, "# later\n", 1, "expected the fields 'type' and 'attributes'"),
    "an alias of what it is in": (
        "[team:shop]",
        "&owners [*owners]",
        4,
        "attributes.owners.0: expected an alias of something else, found one of what it is in",
    ),
    "a nest": (
        "rows.jsonl",
        "[" * 400 + "]" * 400,
        7,
        "attributes.source.path.0: expected at most 50 levels of blocks and lists",
    ),
    "a number that Python does not hold": (
        "  evaluation:",
        f"  adapter: {{steps: {'9' * 5000}}}\n  evaluation:",
        12,
        "attributes.adapter.steps: not a value that can be read: Exceeds the limit",
    ),
    "a date that is none": (
        "name: colours",
        "name: 2024-13-41",
        3,
        "attributes.name: not a value that can be read: month must be in 1..12",
    ),
    "a tag of another program": (
        "[team:shop]",
        "!foo [a]",
        4,
        "attributes.owners: unknown tag !foo; quote what is text",
    ),
    "a tag that runs code": (
        "[team:shop]",
        "!!python/object/apply:os.system ['true']",
        4,
        "attributes.owners: unknown tag !!python/object/apply:os.system; quote what is text",
    ),
    **{
        f"{key} as a key": (
            "  evaluation:",
            f"  {key}: 1\n  evaluation:",
            12,
            f"attributes: expected text as the name of a field, found {key}; quote it",
        )
        for key in ("1", "yes", "~")
    },
    "no type": (
        "type: ml_assets.Customization\n",
        "",
        1,
        "type: required field is missing; expected one of: ml_assets.BaseModels, ml_assets.Customization",
    ),
    "a type without a name": (
        "type: ml_assets.Customization",
        "type:",
        1,
        "type: expected one of: ml_assets.BaseModels, ml_assets.Customization; found none",
    ),
    "a misspelt type": (
        "ml_assets.Customization",
        "ml_assets.Customisation",
        1,
        "type: expected one of: ml_assets.BaseModels, ml_assets.Customization; found "
        "'ml_assets.Customisation' (did you mean 'ml_assets.Customization'?)",
    ),
    "a type from nowhere": (
        "ml_assets.Customization",
        "nowhere.Colours",
        1,
        "type: expected one of: ml_assets.BaseModels, ml_assets.Customization; found 'nowhere.Colours'",
    ),
    "variables that nothing would fill in": (
        "type: ml_assets.Customization",
        "type: ml_assets.Customization\ntemplate_vars_module: .variables",
        2,
        "template_vars_module: unknown field; expected one of: type, attributes, requirements, "
        "post_processing",
    ),
    "requirements that are no block": (
        "type: ml_assets.Customization",
        "type: ml_assets.Customization\nrequirements: none",
        2,
        "requirements: expected a block of fields",
    ),
}


@pytest.mark.parametrize("mistake", FILES)
def test_a_mistake_of_the_file_itself(project: Project, mistake: str) -> None:
    old, new, line, message = FILES[mistake]
    file = project.write("colours", COLOURS_YAML.replace(old, new, 1))
    with pytest.raises(SpecError) as error:
        project.definitions()
    assert str(error.value).startswith(f"{file}:{line}: {message}")
    assert len(str(error.value).splitlines()) == 1


def test_other_components_may_stand_beside_them(project: Project) -> None:
    folder = project.write(
        "more/deeper", COLOURS_YAML.replace("colours", "other"), colour_rows(30)
    ).parent.parent
    (folder / "defs.yaml").write_text("type: dagster.DefsFolderComponent\nattributes: {1: 2}\n")
    with pytest.raises(SpecError, match="expected text as the name of a field, found 1"):
        project.definitions()
    (folder / "defs.yaml").write_text("type: dagster.DefsFolderComponent\npost_processing: {assets: []}\n")
    dg.Definitions.validate_loadable(project.definitions())


def test_a_function_gets_any_keys_and_values_of_yaml(project: Project) -> None:
    (project.root / project.package / "functions.py").write_text("def rows(table): ...\n")
    reference, table = f"{project.package}.functions:rows", "{1: a, yes: [2024-01-01, !!set {b}], ~: c}"
    text = PYTHON_SOURCE.replace("{callable}", reference).replace("{args}", f"{{table: {table}}}")
    project.write("colours", text)
    project.definitions()


LATE = {
    "one file": ({"rows.jsonl": (120, 0), "rows2.jsonl": (0, 5)}, "rows*.jsonl"),
    "a later row": ({"late.jsonl": (120, 30)}, "late.jsonl"),
    "a later file": ({"2025.jsonl": (60, 0), "2026.jsonl": (0, 60)}, "20*.jsonl"),
}


@pytest.mark.parametrize("case", LATE)
def test_a_column_that_comes_later_is_no_mistake(project: Project, case: str) -> None:
    files, path = LATE[case]
    text = COLOURS_YAML.replace("rows.jsonl", path) + "    segments: [language]\n"
    file = project.write("colours", text)
    for name, (without, with_language) in files.items():
        rows = colour_rows(without) + [row | {"language": "de"} for row in colour_rows(with_language)]
        (file.parent / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    project.definitions()
    # one of the prompt is needed in every row
    project.write("colours", text.replace("{text}", "{txt}"))
    with pytest.raises(SpecError, match=r"prompt\.user: column 'txt' is not in the source; it has: text"):
        project.definitions()


def test_durations_become_freshness_policies(project: Project) -> None:
    project.write("other", COLOURS_YAML.replace("colours", "other"), colour_rows(30))
    fresh = COLOURS_YAML.replace(
        "  evaluation:", "  freshness: {dataset: 36h, endpoint: 7d}\n  evaluation:", 1
    )
    project.write("colours", fresh)
    graph = project.definitions().resolve_asset_graph()
    policies = {key.to_user_string(): graph.get(key).freshness_policy for key in graph.get_all_asset_keys()}
    found = {key: policy for key, policy in policies.items() if policy is not None}
    assert found == {
        "colours/dataset": dg.FreshnessPolicy.time_window(fail_window=timedelta(hours=36)),
        "colours/endpoint": dg.FreshnessPolicy.time_window(fail_window=timedelta(days=7)),
    }


def test_a_run_does_not_look_at_the_data_of_others(project: Project) -> None:
    """A column that is renamed in one file of data must not stop the runs of all customizations."""
    project.write("other", COLOURS_YAML.replace("colours", "other"), colour_rows(30))
    project.write("colours", COLOURS_YAML, [{"txt": "renamed", "colour": "red"}])
    with pytest.raises(SpecError, match="column 'text' is not in the source"):
        project.definitions()
    # as a run's process loads it
    program = f"""
from dagster._core.definitions.reconstruct import ReconstructableRepository
repository = ReconstructableRepository.for_module("{project.package}.definitions", "defs")
print(repository.get_reconstructable_job("other__observe").get_definition().name)
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(project.root), str(REPOSITORY)])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.stdout.strip() == "other__observe", result.stderr


@pytest.mark.parametrize(
    ("assets", "loaded"),
    [
        ("colours", {"colours"}),
        ("base_model,other", {"other"}),
        ("colours,other", {"colours", "other"}),
        ("base_model", set()),
        ("fleet", {"colours", "other", "third"}),
        ("colours,fleet", {"colours", "other", "third"}),
        ("", {"colours", "other", "third"}),
        ("own schedule", {"colours", "other", "third"}),
    ],
)
def test_a_run_makes_the_assets_that_it_is_about(project: Project, assets: str, loaded: set[str]) -> None:
    for name in ("other", "third"):
        project.write(name, COLOURS_YAML.replace("colours", name), colour_rows(30))
    if assets == "own schedule":  # a user's, which needs a job of another customization
        assets = "colours"
        (project.defs / "schedules.py").write_text(
            "import dagster as dg\n"
            "nightly = dg.ScheduleDefinition('nightly', job_name='third__main', cron_schedule='0 0 * * *')\n"
        )
    program = f"""
from dagster._core.definitions.reconstruct import ReconstructableRepository
repository = ReconstructableRepository.for_module("{project.package}.definitions", "defs").get_definition()
keys = repository.asset_graph.materializable_asset_keys
print(*sorted(key.path[0] for key in keys if key.path[-1] == "dataset"))
print("base_model" in (key.path[-1] for key in keys), repository.get_job("__ASSET_JOB").name)
"""
    path = os.pathsep.join([str(project.root), str(REPOSITORY)])
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": path} | ({RUN_ASSETS_VARIABLE: assets} if assets else {}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [" ".join(sorted(loaded)), "True __ASSET_JOB"]


def test_a_code_location_has_all_assets_whatever_a_run_was_about(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RUN_ASSETS_VARIABLE, "other")
    assert (
        dg.AssetKey(["colours", "dataset"])
        in project.definitions().resolve_asset_graph().get_all_asset_keys()
    )


def test_all_mistakes_of_a_file_are_told_at_once(project: Project) -> None:
    file = project.write(
        "colours",
        COLOURS_YAML.replace("{text}", "{txt}").replace("[tiny]", "[tyni]").replace("{colour}", "{c}"),
    )
    with pytest.raises(SpecError) as error:
        project.definitions()
    lines = [re.match(rf"{file}:(\d+): ", line) for line in str(error.value).splitlines()]
    assert [match and match.group(1) for match in lines] == ["9", "10", "11"]


def test_a_name_used_twice_names_both_files(project: Project) -> None:
    first = project.defs / "colours" / "defs.yaml"
    second = project.write("colours_again", COLOURS_YAML, colour_rows(30))
    with pytest.raises(SpecError) as error:
        project.definitions()
    assert str(error.value) == (
        f"{second}:3: name: expected a name of its own, found 'colours', which {first}:3 has already"
    )


def test_base_models_are_declared_once(project: Project) -> None:
    other = project.write("more_bases", base_models_yaml({"other": Path("/nowhere")}))
    with pytest.raises(SpecError) as error:
        project.definitions()
    assert str(error.value) == (
        f"{other}:2: expected one ml_assets.BaseModels, found another at {project.defs}/bases/defs.yaml:2"
    )


def test_a_family_declared_twice(project: Project) -> None:
    file = project.write(
        "bases",
        base_models_yaml({"tiny": Path("/a")}) + base_models_yaml({"tiny": Path("/b")}).split("ies:\n")[1],
    )
    with pytest.raises(SpecError) as error:
        project.definitions()
    assert str(error.value) == f"{file}:6: families.1.name: expected distinct names, found 'tiny' again"


def test_a_hub_base_needs_a_revision(project: Project) -> None:
    file = project.write(
        "bases",
        "type: ml_assets.BaseModels\nattributes:\n  families:\n    - name: tiny\n      source:\n"
        "        kind: hub\n        repo: owner/model\n        revision: the best\n",
    )
    with pytest.raises(SpecError) as error:
        project.definitions()
    assert str(error.value) == (
        f"{file}:8: families.0.source.revision: expected a full commit hash, or a branch or tag, "
        "found 'the best'"
    )


MUST_PASS = {
    "no such file": (None, "cannot be read: No such file or directory"),
    "no rows": ("\n", "expected at least one row, found none"),
    "broken JSON": (
        '{"text": "a", "colour": "b"}\n{"text": ',
        "expected one JSON object per line: Expecting value",
    ),
    "no object": ('["text"]\n', ":1: expected a JSON object, found ['text']"),
    "missing column": ('{"text": "a", "colour": "b"}\n{"text": "a"}\n', ":2: column 'colour' is missing"),
}


@pytest.mark.parametrize("case", MUST_PASS)
def test_must_pass_rows_are_there(project: Project, case: str) -> None:
    content, message = MUST_PASS[case]
    file = project.write(
        "colours",
        COLOURS_YAML.replace("task: classification", "task: classification\n    must_pass: must.jsonl"),
    )
    rows = file.parent / "must.jsonl"
    if content is not None:
        rows.write_text(content)
    with pytest.raises(SpecError) as error:
        project.definitions()
    text = str(error.value)
    assert text.startswith(f"{file}:14: evaluation.must_pass: {rows}") and message in text
    assert len(text.splitlines()) == 1


# -- functions, found without running them -------------------------------------------------------------

FUNCTIONS = """
raise SystemExit("the loader must not run this module")
import torch
from somewhere import borrowed
SETTING = 1
def rows(count, *, seed=0): ...
def needs(count, language): ...
def score(expected, answer, row): ...
def score_of_two(expected, answer): ...
class Metric: ...
if SETTING:
    def sometimes(expected, answer, row): ...
"""
PYTHON_SOURCE = COLOURS_YAML.replace(
    "    kind: jsonl\n    path: rows.jsonl", "    kind: python\n    callable: {callable}\n    args: {args}"
)
CALLS = {
    "fits": ("{m}:rows", "{{count: 3}}", None),
    "imported name": ("{m}:borrowed", "{{}}", None),
    "no module": ("{m}.deeper:rows", "{{}}", "there is no module '{m}.deeper' on the Python path"),
    "no function": (
        "{m}:row",
        "{{}}",
        "{f} defines no 'row'; it has: Metric, needs, rows, score, score_of_two, sometimes "
        "(did you mean 'rows'?)",
    ),
    "unknown argument": (
        "{m}:rows",
        "{{count: 3, sead: 1}}",
        "it takes no argument 'sead'; it takes: count, seed (did you mean 'seed'?)",
    ),
    "missing argument": ("{m}:needs", "{{count: 3}}", "its argument 'language' is missing from 'args'"),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_python_source_is_checked_without_running_it(project: Project, case: str) -> None:
    callable_, args, message = CALLS[case]
    module = f"{project.package}.functions"
    functions = project.root / project.package / "functions.py"
    functions.write_text(FUNCTIONS)
    reference = callable_.format(m=module)
    text = PYTHON_SOURCE.replace("{callable}", reference).replace("{args}", args.format())
    file = project.write("colours", text)
    if message is None:
        project.definitions()
    else:
        with pytest.raises(SpecError) as error:
            project.definitions()
        assert str(error.value) == (
            f"{file}:7: source.callable: {reference!r}: {message.format(m=module, f=functions)}"
        )
    assert module not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("score", None),
        ("sometimes", None),
        ("Metric", None),
        ("score_of_two", "expected a function of 3 arguments, found (expected, answer)"),
    ],
)
def test_a_python_metric_takes_three_arguments(project: Project, name: str, message: str | None) -> None:
    (project.root / project.package / "functions.py").write_text(FUNCTIONS)
    reference = f"{project.package}.functions:{name}"
    metric = f"task: text\n    metrics: [{{callable: '{reference}'}}]"
    file = project.write("colours", COLOURS_YAML.replace("task: classification", metric))
    if message is None:
        project.definitions()
    else:
        with pytest.raises(SpecError) as error:
            project.definitions()
        assert str(error.value) == f"{file}:14: evaluation.metrics.0.callable: {reference!r}: {message}"


# -- templates -----------------------------------------------------------------------------------------


def test_variables_are_filled_in_and_prompts_keep_their_braces(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVERGREEN_TEST_RANK", "8")
    monkeypatch.setenv("EVERGREEN_TEST_PASSWORD", "s3cret{{x}}")
    text = (
        COLOURS_YAML.replace("kind: jsonl", "kind: sql\n    query: select text, colour from rows")
        .replace(
            "    path: rows.jsonl", '    url: "postgresql://anna:{{ env.EVERGREEN_TEST_PASSWORD }}@db/shop"'
        )
        .replace('user: "{text}"', "system: '007'\n    user: 'Answer as {{\"colour\": ...}} for {text}'")
        .replace("  evaluation:", '  adapter: {rank: "{{env.EVERGREEN_TEST_RANK}}"}\n  evaluation:')
    )
    file = project.write("colours", text)
    tree = project.definitions().component_tree
    assert tree is not None
    (component,) = tree.get_all_components(Customization)
    assert component.spec.adapter.rank == 8
    assert component.spec.prompt.system == "007"
    assert component.spec.prompt.user == 'Answer as {{"colour": ...}} for {text}'
    assert component.spec.source.url == "postgresql://anna:s3cret{{x}}@db/shop"  # type: ignore[union-attr]
    assert "s3cret" not in json.dumps(component.spec.model_dump(mode="json"))
    assert component.origin.file == file


# -- scaffolding ---------------------------------------------------------------------------------------


def test_a_scaffold_takes_a_family_of_the_defs_folder(project: Project) -> None:
    examples = project.root / "an_example" / "defs" / "bases"
    examples.mkdir(parents=True)
    (examples / "defs.yaml").write_text(base_models_yaml({"of_the_example": Path("/nowhere")}))
    for target in (project.defs / "greetings", project.defs / "more" / "greetings"):
        target.mkdir(parents=True)
        request = dg.ScaffoldRequest(
            type_name="ml_assets.Customization",
            target_path=target,
            scaffold_format="yaml",
            project_root=project.root,
            params=None,
        )
        CustomizationScaffolder().scaffold(request)
        assert "base_models: [tiny]" in (target / "defs.yaml").read_text()


# -- the dg program ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_dg_scaffolds_lists_and_checks(project: Project) -> None:
    """The whole way of a new user, with the program they would use."""
    scaffold = run_dg(project, "scaffold", "defs", "ml_assets.Customization", "greetings")
    assert scaffold.returncode == 0, scaffold.stdout + scaffold.stderr
    file = project.defs / "greetings" / "defs.yaml"
    text = file.read_text()
    assert "name: greetings" in text and "base_models: [tiny]" in text
    assert len(text.splitlines()) < 20

    # the three values to edit: where the rows are, and what to ask and answer
    file.write_text(
        text.replace("data/*.jsonl", "../colours/rows.jsonl")
        .replace("{question}", "{text}")
        .replace("{answer}", "{colour}")
    )
    check = run_dg(project, "check", "defs")
    assert check.returncode == 0, check.stdout + check.stderr
    assert "All definitions loaded successfully" in check.stdout

    listed = json.loads(run_dg(project, "list", "defs", "--json").stdout)
    keys = {asset["asset_key"] for asset in listed["assets"]}
    kinds = ("source", "dataset", "adapter", "eval_report", "endpoint", "traffic", "drift_report", "decision")
    assert keys == {
        "base_model",
        "fleet/overview",
        "fleet/cost_ledger",
        "fleet/migration_plan",
        *(f"{n}/{k}" for n in ("colours", "greetings") for k in kinds),
    }

    components = run_dg(project, "list", "components", "--json").stdout
    assert "ml_assets.Customization" in components and "ml_assets.BaseModels" in components


@pytest.mark.slow
def test_dg_tells_mistakes_with_file_and_line(project: Project) -> None:
    broken = COLOURS_YAML.replace("{text}", "{txt}")
    file = project.write("colours", broken)
    output = run_dg(project, "check", "defs")
    assert output.returncode != 0
    relative = file.relative_to(project.root)
    assert f"{relative}:9: prompt.user: column 'txt' is not in the source" in output.stdout + output.stderr

    project.write("colours", broken.replace("    task: classification", "    task: clasification"))
    output = run_dg(project, "check", "yaml")
    assert output.returncode != 0
    assert f"{file}:13 - ml_assets.Customization attributes.evaluation.task" in output.stdout
    assert "'clasification' is not one of ['classification', 'json', 'text']" in output.stdout

    project.write("colours", COLOURS_YAML.replace("path: rows", "pth: rows"))
    output = run_dg(project, "check", "yaml")
    assert "'pth' was unexpected" in output.stdout and "'path' is a required property" in output.stdout


@pytest.mark.slow
def test_base_models_scaffold(project: Project) -> None:
    shutil.rmtree(project.defs / "bases")
    result = run_dg(project, "scaffold", "defs", "ml_assets.BaseModels", "bases")
    assert result.returncode == 0, result.stdout + result.stderr
    file = project.defs / "bases" / "defs.yaml"
    file.write_text(file.read_text().replace("my_base", "tiny"))
    dg.Definitions.validate_loadable(project.definitions())
