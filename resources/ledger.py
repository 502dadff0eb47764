"""The ledger of releases, as a resource."""

import contextlib
from collections.abc import Iterator

import dagster as dg
from pydantic import Field

from ml_assets.decisions.book import DecisionBook
from ml_assets.endpoints.ledger import Ledger
from ml_assets.settings import Settings


class LedgerResource(dg.ConfigurableResource):
    """Which adapter version serves which customization, since when and why."""

    url: str = Field(
        default_factory=lambda: Settings.from_env().ledger_url,
        description="SQLAlchemy URL, such as sqlite:////data/ledger.db or postgresql+psycopg://...",
    )

    def ledger(self) -> Ledger:
        """The ledger; the caller closes it, or uses `opened`."""
        return Ledger(self.url)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Ledger]:
        with contextlib.closing(self.ledger()) as ledger:
            yield ledger

    @contextlib.contextmanager
    def decisions(self) -> Iterator[DecisionBook]:
        """The decisions, costs and alerts in the same database."""
        with self.opened() as ledger:
            yield DecisionBook(ledger)
