"""The command `evergreen`: operate a deployment on this machine."""

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

from ml_assets.cli import supervisor
from ml_assets.cli.supervisor import OperationError, print_urls
from ml_assets.settings import Settings

MOST_DAYS = 36_500  # dates end at the year 9999


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code (0: well, 1: the message says what to change, 2: usage)."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(Settings.from_env(), options)
    except (OperationError, ValueError) as error:
        print(f"evergreen: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "\nevergreen: interrupted; what was started goes on (`evergreen down` ends it)", file=sys.stderr
        )
        return 130
    except _outside() as error:
        print(f"evergreen: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def _outside() -> tuple[type[Exception], ...]:
    """Errors of what this project rests on, whose messages say enough. Evaluated when something was raised:
    importing them takes seconds."""
    from sqlalchemy.exc import SQLAlchemyError

    from ml_assets.artifacts import ArtifactError
    from resources.mlflow_tracking import TrackingUnavailable

    return (OSError, ArtifactError, SQLAlchemyError, TrackingUnavailable)


def _parser() -> argparse.ArgumentParser:
    settings = "\n".join(
        line
        for line in (sys.modules[Settings.__module__].__doc__ or "").splitlines()
        if line.startswith("| `EVERGREEN_")
    )
    lines = settings.replace("`", "").splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    parser = argparse.ArgumentParser(
        prog="evergreen",
        description="Keep customized language models current. Operates Dagster, MLflow and the gateway here.",
        epilog="environment variables:\n" + "\n".join(f"  {v:25} {m} (default: {d})" for v, d, m in table),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, function: object, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=function)
        return sub

    command("init", _init, "create the data directory, its Dagster instance and its MLflow store")
    command("up", _up, "start Dagster, MLflow and the gateway in the background, and wait until they answer")
    command("down", _down, "end them; runs in progress are requeued at the next `up`")
    command("status", _status, "say what runs and answers; exit code 1 if anything does not")
    command("demo", _demo, "run the main job on the customizations of this project, and serve the result")
    text = "remove artifacts that nothing names any more, and say why the rest stays"
    garbage = command("gc", _gc, text)
    garbage.add_argument("--dry-run", action="store_true", help="only say what would go")
    garbage.add_argument(
        "--retire",
        action="store_true",
        help="also base revisions that no release names inside its retention; their partitions are deleted",
    )
    garbage.add_argument(
        "--unused-days",
        type=float,
        metavar="N",
        help="what nothing names stays that long after its last use (default: 30)",
    )
    labels = command("labels", None, "labels that decisions asked for")
    ways = labels.add_subparsers(title="actions", required=True, metavar="ACTION")
    text = "store the right answers that were filled in, as feedback of the keys that asked"
    bring = ways.add_parser("import", help=text, description=text)
    bring.add_argument("file", type=Path, help="<home>/labels/<customization>/<decision>.jsonl")
    bring.set_defaults(run=_labels_import)
    keys = command("keys", None, "API keys of the gateway")
    actions = keys.add_subparsers(title="actions", required=True, metavar="ACTION")

    create = actions.add_parser("create", help="make a key and print it, once", description="Make a key.")
    create.add_argument("--name", default="", help="whose it is or what for")
    create.add_argument(
        "--scope",
        action="append",
        metavar="NAME",
        help="a customization that it may use, '*' for all (the default), or 'admin'; may be repeated",
    )
    create.add_argument("--days", type=float, metavar="N", help="how long it is valid (default: for ever)")
    create.add_argument(
        "--no-log", action="store_true", help="store nothing of its requests but their number; no feedback"
    )
    create.set_defaults(run=_keys_create)
    actions.add_parser("list", help="list keys, without their secrets").set_defaults(run=_keys_list)
    revoke = actions.add_parser("revoke", help="end a key, at once")
    revoke.add_argument("id", help="as `keys list` shows it")
    revoke.set_defaults(run=_keys_revoke)
    return parser


def _init(settings: Settings, _options: argparse.Namespace) -> int:
    supervisor.initialize(settings)
    print(f"data directory: {settings.home}")
    return 0


def _up(settings: Settings, _options: argparse.Namespace) -> int:
    print("Starting Dagster, MLflow and the gateway ...", flush=True)
    started = supervisor.start(settings)
    state = supervisor.read_state(settings)
    print("All answer:" if started else "Already running:")
    print_urls(state["urls"] if state else supervisor.urls(settings))
    print(f"  log         {supervisor.log_path(settings)}")
    return 0


def _down(settings: Settings, _options: argparse.Namespace) -> int:
    was_running, interrupted = supervisor.stop(settings)
    print("Stopped." if was_running else f"Nothing was running in {settings.home}.")
    if interrupted:
        print(f"{interrupted} run(s) in progress were interrupted; the next `evergreen up` requeues them.")
    return 0


def _status(settings: Settings, _options: argparse.Namespace) -> int:
    state = supervisor.read_state(settings)
    if state is None or not supervisor.is_running(settings):
        print(f"not running (data directory {settings.home})")
        return 1
    up = supervisor.answers(settings, state["urls"])
    for name, well in up.items():
        print(f"{name:10} {'answers' if well else 'DOES NOT ANSWER'}  {state['urls'].get(name, '')}".rstrip())
    print(f"log        {supervisor.log_path(settings)}")
    return 0 if all(up.values()) else 1


def _demo(settings: Settings, _options: argparse.Namespace) -> int:
    from ml_assets.cli.demo import demo

    demo(settings)
    return 0


def _gc(settings: Settings, options: argparse.Namespace) -> int:
    import importlib.util
    import os

    from dagster import ComponentTree, DagsterInstance
    from dagster.components.core.component_tree import ComponentTreeException

    from ml_assets.artifacts import ArtifactStore
    from ml_assets.customization import Customization
    from ml_assets.fleet.garbage_job import GarbageConfig, collect_garbage
    from ml_assets.mistakes import SpecError, check_files
    from resources.mlflow_tracking import MlflowTracking

    if not settings.dagster_home.is_dir():
        raise OperationError(f"{settings.home}: no data directory yet (`evergreen init` makes one)")
    days: dict[str, float] = {}
    if options.unused_days is not None:
        days = {"unused_days": _days("--unused-days", options.unused_days, 1)}
    config = GarbageConfig(dry_run=options.dry_run, retire=options.retire, **days)
    module = importlib.util.find_spec(os.environ.get(supervisor.MODULE_VARIABLE, "ml_assets.definitions"))
    if module is None or module.origin is None:
        raise OperationError(f"{supervisor.MODULE_VARIABLE}: there is no such module")
    project = Path(module.origin).parent
    try:
        check_files(project)
        tree = ComponentTree.for_project(project)
        specs = [component.spec for component in tree.get_all_components(Customization)]
    except (SpecError, ComponentTreeException) as error:
        reason: BaseException = error  # Dagster draws the whole tree; what is wrong is in the cause
        while reason.__cause__:
            reason = reason.__cause__
        raise OperationError(f"can't load the definitions: {reason}") from error
    store = ArtifactStore(settings.artifacts_url, settings.artifact_cache)
    with DagsterInstance.from_config(str(settings.dagster_home)) as instance, _ledger(settings) as ledger:
        for line in collect_garbage(config, instance, store, ledger, MlflowTracking(), specs):
            print(line)
    return 0


def _labels_import(settings: Settings, options: argparse.Namespace) -> int:
    from contextlib import closing

    from ml_assets.decisions.labels import LabelError, read_labels
    from ml_assets.traffic.records import OPERATOR
    from ml_assets.traffic.writer import (
        Policy,
        RedactionUnavailable,
        TrafficWriter,
        Unavailable,
        UnknownRequest,
    )

    stored, gone = 0, 0
    try:
        labels = list(read_labels(options.file))
    except LabelError as error:
        raise OperationError(str(error)) from error
    with _ledger(settings) as ledger, closing(TrafficWriter(settings.traffic_url)) as writer:
        for name, release in ledger.newest_all().items():
            writer.set_policy(name, Policy.of(release.traffic_policy))
        writer.start()
        for request, _, answer in labels:
            try:  # as the gateway takes it, redacted
                writer.give_feedback(request, OPERATOR, None, answer).result()
                stored += 1
            except UnknownRequest:
                gone += 1
            except (Unavailable, RedactionUnavailable) as error:
                raise OperationError(f"{error} ({stored} right answers are stored)") from error
    print(f"{stored} right answers stored." + (f" {gone} requests are not kept any more." if gone else ""))
    return 0


def _keys_create(settings: Settings, options: argparse.Namespace) -> int:
    from ml_assets.endpoints.gateway import keys

    expires = None
    if options.days is not None:
        days = datetime.timedelta(days=_days("--days", options.days, 0))
        expires = datetime.datetime.now(datetime.UTC) + days
    with _ledger(settings) as ledger:
        key, info = keys.create(
            ledger,
            options.scope or ["*"],
            name=options.name,
            expires_at=expires,
            unlogged=options.no_log,
        )
    print(key)  # alone on stdout, so that a script can take it
    print(f"Key {info.id}: only its hash is stored, so keep it now.", file=sys.stderr)
    return 0


def _keys_list(settings: Settings, _options: argparse.Namespace) -> int:
    from ml_assets.endpoints.gateway import keys

    with _ledger(settings) as ledger:
        print(f"{'id':8}  {'scopes':24}  {'created':19}  {'state':20}  name")
        for info in keys.list_keys(ledger):
            state = "valid" if info.valid else "revoked" if info.revoked_at else "expired"
            if info.valid and info.expires_at:
                state = f"until {info.expires_at[:10]}"
            state += ", no log" if info.valid and info.unlogged else ""
            scopes = ",".join(info.scopes)
            print(f"{info.id:8}  {scopes:24}  {info.created_at[:19]}  {state:20}  {info.name}")
    return 0


def _keys_revoke(settings: Settings, options: argparse.Namespace) -> int:
    from ml_assets.endpoints.gateway import keys

    with _ledger(settings) as ledger:
        try:
            info = keys.revoke(ledger, options.id)
        except KeyError as error:
            raise OperationError(error.args[0]) from error
    print(f"Key {info.id} ({info.name}) is revoked.")
    return 0


def _days(option: str, days: float, least: int) -> float:
    if not least <= days <= MOST_DAYS:  # nor is NaN
        raise OperationError(f"{option} {days:g}: expected {least} to {MOST_DAYS} days")
    return days


def _ledger(settings: Settings):
    from contextlib import closing

    from ml_assets.endpoints.ledger import Ledger

    settings.home.mkdir(parents=True, exist_ok=True)
    return closing(Ledger(settings.ledger_url))


if __name__ == "__main__":
    sys.exit(main())
