"""Computing is written down where it happens, also when it fails."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ml_assets.decisions.book import DecisionBook
from ml_assets.decisions.records import Cost


@dataclass
class Meter:
    """What a computation spent; `read` it when that is known better than by the clock."""

    device_seconds: float | None = None
    rows: int = 0
    money: float = 0.0
    """Paid to somebody else, beside the price of the device."""

    def read(self, device_seconds: float, rows: int) -> None:
        self.device_seconds, self.rows = device_seconds, rows


@contextlib.contextmanager
def metered(
    open_book: Callable[[], contextlib.AbstractContextManager[DecisionBook]], cost: Cost, price: float
) -> Iterator[Meter]:
    """Record the cost of the block: what the meter was told, else the seconds that it took. Nothing is
    recorded for a block that found its result in a memo (0 seconds). `price` is money for a device second."""
    meter, started = Meter(), time.monotonic()
    try:
        yield meter
    finally:
        seconds = time.monotonic() - started if meter.device_seconds is None else meter.device_seconds
        if seconds > 0:
            money = seconds * price + meter.money
            with open_book() as book:
                book.record_cost(
                    dataclasses.replace(cost, device_seconds=seconds, rows=meter.rows, money=money)
                )
