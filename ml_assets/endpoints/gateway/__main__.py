"""Run the gateway: `python -m ml_assets.endpoints.gateway`, configured by the variables of
`ml_assets.settings`."""

import logging

import uvicorn

from ml_assets.endpoints.gateway.app import app_from_settings
from ml_assets.settings import Settings

SHUTDOWN_SECONDS = 10


def _is_news(record: logging.LogRecord) -> bool:
    """Whether an access is worth a line: monitors ask every few seconds."""
    path = record.args[2] if isinstance(record.args, tuple) and len(record.args) > 2 else ""
    return not str(path).startswith(("/healthz", "/metrics"))


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn.access").addFilter(_is_news)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would name every request to a vLLM server
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
