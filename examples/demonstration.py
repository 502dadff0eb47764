"""How a demonstration ends when it can't go on."""

import sys
from collections.abc import Callable

import httpx

from ml_assets.base_models.identity import BaseModelError
from ml_assets.cli.supervisor import OperationError
from ml_assets.downloads import DownloadError
from ml_assets.settings import Settings


def demonstrate(settings: Settings, show: Callable[[], None]) -> int:
    """Do it, and give the exit code. What stops it is told in a line, with how to end the deployment, which
    goes on."""
    try:
        show()
    except KeyboardInterrupt:
        reason = "interrupted"
    except (OperationError, BaseModelError, DownloadError, httpx.HTTPError, OSError) as error:
        reason = str(error) or type(error).__name__
    else:
        return 0
    sys.stderr.write(f"error: {reason}\n`make down EVERGREEN_HOME={settings.home}` ends what was started\n")
    return 1
