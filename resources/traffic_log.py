"""The traffic database, as a resource."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import sqlalchemy as sa
from pydantic import Field

from ml_assets.settings import Settings
from ml_assets.traffic.records import Judged
from ml_assets.traffic.store import TrafficLog


class TrafficLogResource(dg.ConfigurableResource):
    """What the endpoints were asked and answered, and what users said about it."""

    url: str = Field(
        default_factory=lambda: Settings.from_env().traffic_url,
        description="SQLAlchemy URL, such as sqlite:////data/traffic.db or postgresql+psycopg://...",
    )

    def traffic_log(self) -> TrafficLog:
        """The traffic database; the caller closes it, or uses `opened`."""
        return TrafficLog(self.url)

    @contextlib.contextmanager
    def opened(self) -> Iterator[TrafficLog]:
        with contextlib.closing(self.traffic_log()) as log:
            yield log

    def feedback(self, customization: str) -> list[Judged]:
        """All feedback of a customization; none where there is no database yet, which is not made for it."""
        url = sa.make_url(self.url)
        if url.get_backend_name() == "sqlite" and not (url.database and Path(url.database).exists()):
            return []
        with self.opened() as log:
            return log.feedback(customization)
