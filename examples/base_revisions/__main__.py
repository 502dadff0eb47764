"""Make a revision of SmolLM2 and publish it as a model directory: see `--help`."""

import argparse
import sys
import time
from pathlib import Path

from examples.base_revisions.revisions import REVISIONS, make, publish
from ml_assets.base_models.identity import BaseModelError
from ml_assets.downloads import DownloadError
from ml_assets.settings import Settings


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.base_revisions",
        description="Make a revision of SmolLM2-135M-Instruct (minutes, the first time) and publish it.",
    )
    parser.add_argument("revision", choices=REVISIONS)
    parser.add_argument(
        "--out", type=Path, required=True, help="a link to the revision, exchanged at once when it is there"
    )
    given = parser.parse_args()
    try:
        made = make(given.revision, Settings.from_env(), log=_say)
        publish(made, given.out)
    except (BaseModelError, DownloadError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _say(f"{given.out} is {made.directory.name}, made in {made.record['seconds']} s")
    return 0


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
