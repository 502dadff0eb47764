"""Run the gateway: `python -m ml_assets.endpoints.gateway`, configured by the variables of
`ml_assets.settings`."""

import logging

import uvicorn

from ml_assets.endpoints.gateway.app import app_from_settings
from ml_assets.settings import Settings

SHUTDOWN_SECONDS = 10


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    settings = Settings.from_env()
    uvicorn.run(
        app_from_settings(),
        host=settings.host,
        port=settings.gateway_port,
        log_config=None,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )


if __name__ == "__main__":
    main()
