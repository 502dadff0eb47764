"""The command line as a person uses it."""

import re
import socket

import pytest

from ml_assets.artifacts import ArtifactError
from ml_assets.cli import supervisor
from ml_assets.cli.main import main
from resources.mlflow_tracking import TrackingUnavailable


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("EVERGREEN_HOME", str(tmp_path / "home"))
    for variable in ("EVERGREEN_DAGSTER_PORT", "EVERGREEN_LEDGER_URL"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path / "home"


def test_help_names_every_command_and_variable(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    variables = ("EVERGREEN_HOME", "EVERGREEN_MLFLOW_URI", "EVERGREEN_THREADS", "EVERGREEN_DTYPE")
    for word in ("init", "up", "down", "status", "demo", "keys", *variables):
        assert re.search(rf"^\s+{word}\s", text, re.M), word
    assert "`in_process` or `vllm`" not in text and "in_process or vllm (default" in text


@pytest.mark.parametrize("arguments", [[], ["fly"], ["keys"], ["keys", "revoke"]])
def test_an_unknown_command_is_a_usage_error(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: evergreen" in capsys.readouterr().err


def test_a_key_is_made_listed_and_revoked(capsys, home):
    assert main(["keys", "create", "--name", "till", "--scope", "home_commands", "--days", "2"]) == 0
    captured = capsys.readouterr()
    key = captured.out.strip()
    key_id = re.fullmatch(r"evg_([0-9a-f]{8})_\S{43}", key)
    assert key_id
    assert main(["keys", "list"]) == 0
    listing = capsys.readouterr().out
    assert re.search(rf"^{key_id[1]}  home_commands .* until 20\d\d-\d\d-\d\d +till$", listing, re.M), listing
    assert key not in listing
    assert main(["keys", "revoke", key_id[1]]) == 0
    assert main(["keys", "list"]) == 0
    assert re.search(rf"^{key_id[1]}  .* revoked +till$", capsys.readouterr().out, re.M)
    stored = b"".join(path.read_bytes() for path in home.rglob("*") if path.is_file())
    assert key.encode() not in stored


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["keys", "revoke", "00000000"], "no API key with id '00000000'"),
        (["keys", "create", "--scope", "Not A Name"], "expected a customization name"),
        (["keys", "create", "--days", "0"], "expected a time in the future"),
        (["keys", "create", "--days", "-1"], "--days -1: expected 0 to 36500 days"),
        (["keys", "create", "--days", "99999999"], "--days 1e+08: expected 0 to 36500 days"),
        (["keys", "create", "--days", "inf"], "--days inf: expected 0 to 36500 days"),
        (["keys", "create", "--days", "nan"], "--days nan: expected 0 to 36500 days"),
        (["gc", "--unused-days", "0.5"], "--unused-days 0.5: expected 1 to 36500 days"),
        (["gc", "--unused-days", "1e12"], "--unused-days 1e+12: expected 1 to 36500 days"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(arguments, message, capsys, home):
    (home / "dagster").mkdir(parents=True)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("evergreen: error: ")
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("type: ml_assets.Customization\nattributes:\n  nme: tickets\n", "defs.yaml:3: nme: unknown field"),
        ("type: ml_assets.Customisation\nattributes: {}\n", "defs.yaml:1: "),
        ("type: ml_assets.Customization\nattributes: [\n", "not valid YAML"),
    ],
)
def test_a_mistake_in_a_yaml_is_what_gc_says(content, message, capsys, home, tmp_path, monkeypatch):
    (home / "dagster").mkdir(parents=True)
    shop = f"shop_{tmp_path.name}"  # a module is imported once
    folder = tmp_path / shop / "defs/tickets"
    folder.mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text(
        f'[tool.dg]\ndirectory_type = "project"\n[tool.dg.project]\nroot_module = "{shop}"\n'
    )
    for package in (shop, f"{shop}/defs"):
        (tmp_path / package / "__init__.py").touch()
    (folder / "defs.yaml").write_text(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(supervisor.MODULE_VARIABLE, shop)
    assert main(["gc"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("evergreen: error: can't load the definitions: ")
    assert message in error
    assert "Traceback" not in error and "__init__.py" not in error


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"urls": '])
@pytest.mark.parametrize("command", ["status", "down", "up"])
def test_a_damaged_note_of_what_runs_is_named(command, content, capsys, home):
    home.mkdir()
    (home / "supervisor.json").write_text(content)
    assert main([command]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"evergreen: error: {home}/supervisor.json: expected what `evergreen up` wrote")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "error",
    [
        TrackingUnavailable("MLflow cannot be reached:\nno route"),
        ArtifactError("MLflow cannot be reached: no route"),
        FileNotFoundError("MLflow cannot be reached: no route"),
    ],
)
def test_what_is_away_is_one_line_and_exit_code_1(error, capsys, monkeypatch):
    def start(_settings):
        raise error

    monkeypatch.setattr(supervisor, "start", start)
    assert main(["up"]) == 1
    assert capsys.readouterr().err == "evergreen: error: MLflow cannot be reached: no route\n"


def test_a_ledger_that_can_not_be_read_is_one_line(capsys, home):
    home.mkdir()
    (home / "ledger.db").write_bytes(b"damaged " * 1000)
    assert main(["keys", "list"]) == 1
    error = capsys.readouterr().err
    assert "file is not a database" in error and len(error.splitlines()) == 1


def test_a_port_that_is_no_port_names_its_variable(monkeypatch, capsys):
    monkeypatch.setenv("EVERGREEN_DAGSTER_PORT", "http")
    assert main(["up"]) == 1
    assert "EVERGREEN_DAGSTER_PORT='http': expected a port number" in capsys.readouterr().err


def test_up_with_a_taken_port_starts_nothing(monkeypatch, capsys, home):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("EVERGREEN_DAGSTER_PORT", str(port))
        assert main(["up"]) == 1
    assert f"port {port} is in use" in capsys.readouterr().err
    assert [path.name for path in home.iterdir()] == ["operation.lock"]


def test_status_and_down_of_nothing(capsys, home):
    assert main(["status"]) == 1
    assert capsys.readouterr().out == f"not running (data directory {home})\n"
    assert main(["down"]) == 0
    assert capsys.readouterr().out == f"Nothing was running in {home}.\n"
