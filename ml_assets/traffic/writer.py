"""Writes the gateway's traffic beside its requests: a bounded queue, and a thread that redacts and stores."""

import dataclasses
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import ValidationError
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from ml_assets.datasets.redaction import RedactionUnavailable, Redactor, redactor
from ml_assets.spec import DatasetSpec, TrafficSpec
from ml_assets.traffic.records import OPERATOR, FeedbackRecord, Rating, TrafficRecord
from ml_assets.traffic.store import NewerSchema, TrafficLog, UnknownRequest

SECONDS = 0.05
"""Between two writes: what was answered later than that before a SIGKILL may be lost."""
ROWS = 256
"""Records of one transaction; so many that wait are written at once."""
BOUND = 10_000
"""Records that may wait while the database is away; then the oldest go."""
MAX_TEXT = 32_768
"""Characters of a text that are stored: a longer one is cut there, and ends with CUT."""
CUT = "… [CUT]"
LONGEST_SECRET = 16_384
"""Characters of a piece of personal data that the cut could divide: so many more are looked at."""
READ_ONLY = "25006"
"""PostgreSQL's SQLSTATE of a server that takes no writes, such as a standby after a failover."""
COMPLAINT_SECONDS = 60.0
"""Between two log lines about records of one customization that can't be stored."""
RETRY_SECONDS = 2.0
PURGE_SECONDS = 60.0
PURGE_ROWS = 500
FEEDBACK_WAITING = 64
"""Feedback that may wait for the database."""
CLOSE_SECONDS = 5.0

log = logging.getLogger("evergreen.gateway")


class Busy(Exception):
    """Too much feedback waits for the database already."""


class Unavailable(Exception):
    """The traffic database can't be opened or does not answer; the message says why."""


@dataclass(frozen=True)
class Policy:
    """How the texts of a customization are stored: what is redacted, and for how long they are kept. The
    default is what holds where nothing, or nothing that can be read, is known."""

    redact: tuple[str, ...] | str = tuple(DatasetSpec().redact)
    retention: str = TrafficSpec().retention

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> "Policy":
        """The policy that a release recorded."""
        if not values:
            return cls()
        try:
            redact = DatasetSpec(redact=values["redact"]).redact
            retention = TrafficSpec(retention=values["retention"]).retention
        except (KeyError, TypeError, ValidationError) as error:
            log.error("a release's traffic policy is not readable, the default holds: %s", error)
            return cls()
        return cls(redact if isinstance(redact, str) else tuple(redact), retention)

    def kept_since(self, now: datetime) -> str:
        """Rows from before this time go."""
        unit = {"m": "minutes", "h": "hours", "d": "days"}[self.retention[-1]]
        try:
            since = now - timedelta(**{unit: int(self.retention[:-1])})
        except OverflowError:  # before all calendars: nothing goes
            since = datetime.min.replace(tzinfo=UTC)
        return since.isoformat(timespec="microseconds")


class TrafficWriter:
    """Takes records from the event loop without waiting, and stores them.

    Records are redacted by the policy of their customization, then stored in batches, at least every
    `seconds` or `rows` records. While the database is away they wait, at most `bound` of them, and the oldest
    are dropped. Rows past their retention are deleted now and then. What happened to records is counted by
    `counted(customization, outcome)`: `stored`, `unlogged` (the key wants nothing stored), `dropped` (the
    queue was full), `refused` (it could not be redacted or stored at all).
    """

    def __init__(
        self,
        url: str,
        *,
        seconds: float = SECONDS,
        rows: int = ROWS,
        bound: int = BOUND,
        counted: Callable[[str, str, int], None] = lambda customization, outcome, n: None,
    ):
        self.url = url
        self.seconds, self.rows, self.bound = seconds, rows, bound
        self.counted = counted
        self._policies: dict[str, Policy] = {}
        self._redactors: dict[tuple[str, ...] | str, Redactor] = {}
        self._queue: deque[TrafficRecord] = deque()
        self._unlogged: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._put = self._settled = 0  # records ever taken in, and those stored or given up
        self._dropped = 0  # since the last line of the log about it
        self._hurry = self._closed = False
        self._log: TrafficLog | None = None
        self._opening = threading.Lock()
        self._problem: str | None = None
        self._purge_at = 0.0
        self._complain_at: dict[str, float] = {}
        self._feedback_waiting = 0
        self._feedback = ThreadPoolExecutor(2, thread_name_prefix="feedback")
        self._thread = threading.Thread(target=self._work, name="traffic", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Store what waits, for at most `seconds`, and end."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._feedback.shutdown(wait=False, cancel_futures=True)
        if self._thread.is_alive():
            self._thread.join(seconds)
        if self._queue:
            log.error("traffic: %d records were not stored before the end", len(self._queue))

    def set_policy(self, customization: str, policy: Policy) -> None:
        """From now on its records are stored by this policy."""
        with self._changed:
            self._policies[customization] = policy

    def put(self, record: TrafficRecord) -> None:
        """Take in a record; returns at once."""
        dropped = None
        with self._changed:
            if len(self._queue) >= self.bound:
                dropped = self._queue.popleft()
                self._settled += 1
                self._dropped += 1
            self._queue.append(record)
            self._put += 1
            # a thread that is woken for each record would take the event loop's turn each time
            if len(self._queue) == 1 or len(self._queue) == self.rows:
                self._changed.notify_all()
        if dropped is not None:
            self.counted(dropped.customization, "dropped", 1)

    def put_unlogged(self, customization: str) -> None:
        """Count a request whose key wants nothing stored."""
        with self._changed:
            self._unlogged[customization] += 1
            if len(self._unlogged) == 1:
                self._changed.notify_all()
        self.counted(customization, "unlogged", 1)

    def flush(self, seconds: float = 30.0) -> bool:
        """Wait until all that was put before is stored or given up; False when it takes longer."""
        with self._changed:
            wanted, self._hurry = self._put, True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._settled >= wanted, seconds)

    # -- feedback --------------------------------------------------------------------------------------

    def give_feedback(self, request_id: str, key_id: str, rating: Rating | None, right_answer: str | None):
        """A future of the FeedbackRecord, done when it is committed. Its errors are UnknownRequest,
        Unavailable and RedactionUnavailable. Raises Busy."""
        with self._changed:
            if self._feedback_waiting >= FEEDBACK_WAITING:
                raise Busy(f"{self._feedback_waiting} feedback requests wait for the database already")
            self._feedback_waiting += 1
        try:
            future = self._feedback.submit(self._give, request_id, key_id, rating, right_answer)
        except RuntimeError as error:
            self._feedback_done(None)
            raise Unavailable("the gateway is shutting down") from error
        future.add_done_callback(self._feedback_done)
        return future

    def _feedback_done(self, _future: Any) -> None:
        with self._changed:
            self._feedback_waiting -= 1

    def _give(
        self, request_id: str, key_id: str, rating: Rating | None, right_answer: str | None
    ) -> FeedbackRecord:
        try:
            store = self._opened()
            asked = store.request(request_id)
            if asked is None:  # it may wait to be stored
                if not self.flush():
                    raise Unavailable(self._problem or "the traffic database does not answer")
                asked = store.request(request_id)
            if asked is None or key_id not in (asked.key_id, OPERATOR):
                raise UnknownRequest(request_id)
            if right_answer is not None:
                right_answer = self._clean(right_answer, self._redactor(asked.customization))
            return store.give_feedback(request_id, key_id, rating, right_answer)
        except DBAPIError as error:
            if not self._away(error):
                raise
            raise Unavailable(f"the traffic database does not answer: {_first_line(error)}") from error

    # -- the writing thread ----------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._unlogged or self._closed, PURGE_SECONDS)
                deadline = time.monotonic() + self.seconds
                while not (self._hurry or self._closed or len(self._queue) >= self.rows):
                    if not (self._queue or self._unlogged) or not self._changed.wait(
                        deadline - time.monotonic()
                    ):
                        break
                batch = [self._queue.popleft() for _ in range(min(self.rows, len(self._queue)))]
                unlogged, self._unlogged = self._unlogged, Counter()
                closed = self._closed
            stored = self._write(batch, unlogged)
            with self._changed:
                if not self._queue:
                    self._hurry = False
                if closed and not (stored and self._queue):
                    break
            if time.monotonic() >= self._purge_at:
                self._purge()
        if self._log is not None:
            self._log.close()

    def _write(self, batch: list[TrafficRecord], unlogged: Counter[str]) -> bool:
        clean: list[TrafficRecord] = []
        for record in batch:
            try:
                clean.append(self._redacted(record))
            except Exception as error:
                self._give_up(record, error)
            time.sleep(0)  # the event loop's turn: patterns hold the interpreter
        return self._store(clean, unlogged)

    def _store(self, clean: list[TrafficRecord], unlogged: Counter[str]) -> bool:
        """Store a batch, however long the database is away; what can't be stored at all is given up. False
        when the gateway ends before."""
        while clean or unlogged:
            try:
                self._opened().append(clean, unlogged)
                for name, n in Counter(record.customization for record in clean).items():
                    self.counted(name, "stored", n)
                self._settle(len(clean))
                self._tell_dropped()
                if self._problem:
                    log.warning("traffic: the database answers again")
                self._problem = None
                return True
            except Exception as error:
                if self._away(error):
                    if not self._wait(error):
                        # the process ends: what could not be written goes back, to be counted as lost
                        with self._changed:
                            self._queue.extendleft(reversed(clean))
                        return False
                    clean = self._within_bound(clean)
                    continue
                if not clean:
                    log.error("traffic: counts were not stored", exc_info=error)
                    return True
                if len(clean) == 1:
                    self._give_up(clean.pop(), error)
                    continue
                while clean:  # one of them is the reason
                    if not self._store([clean.pop(0)], Counter()):
                        with self._changed:
                            self._queue.extendleft(reversed(clean))
                        return False
        return True

    def _away(self, error: Exception) -> bool:
        """Whether the database can't be written to now, whatever is to be stored."""
        if isinstance(error, DBAPIError) and getattr(error.orig, "sqlstate", None) == READ_ONLY:
            if self._log is not None:
                self._log.engine.dispose()  # a connection stays with the server that it was made to
            return True
        return isinstance(error, (OperationalError, InterfaceError, NewerSchema, Unavailable, OSError))

    def _wait(self, error: Exception) -> bool:
        """Before another attempt; False when the gateway ends."""
        if self._problem is None:
            log.error("traffic: the database is away, records wait: %s", _first_line(error))
        self._problem = _first_line(error)
        self._tell_dropped()
        with self._changed:
            return not self._changed.wait_for(lambda: self._closed, RETRY_SECONDS)

    def _within_bound(self, batch: list[TrafficRecord]) -> list[TrafficRecord]:
        """A batch that waits counts, too: it has the oldest."""
        with self._changed:
            over = min(len(batch), max(0, len(self._queue) + len(batch) - self.bound))
            self._dropped += over
        for record in batch[:over]:
            self.counted(record.customization, "dropped", 1)
        self._settle(over)
        return batch[over:]

    def _tell_dropped(self) -> None:
        with self._changed:
            dropped, self._dropped = self._dropped, 0
        if dropped:
            log.error("traffic: %d records dropped, the queue was full", dropped)

    def _give_up(self, record: TrafficRecord, error: Exception) -> None:
        name, now = record.customization, time.monotonic()
        if now >= self._complain_at.get(name, 0.0):
            self._complain_at[name] = now + COMPLAINT_SECONDS
            log.error("traffic: %s of %s is not stored: %s", record.id, name, _first_line(error))
        self.counted(record.customization, "refused", 1)
        self._settle(1)

    def _settle(self, n: int) -> None:
        with self._changed:
            self._settled += n
            self._changed.notify_all()

    def _opened(self) -> TrafficLog:
        with self._opening:
            if self._log is None:
                try:
                    self._log = TrafficLog(self.url)
                except Exception as error:
                    if not self._away(error):
                        raise
                    raise Unavailable(_first_line(error)) from error
            return self._log

    def _purge(self) -> None:
        """Delete what is past its retention, a few rows at a time."""
        again = False
        try:
            store, now = self._opened(), datetime.now(UTC)
            for name in store.heads():
                deleted = store.purge(name, self._policy(name).kept_since(now), PURGE_ROWS)
                again = again or deleted == PURGE_ROWS
        except Exception as error:  # the next attempt may do; what waits to be stored must not wait for it
            log.warning("traffic: old records were not deleted: %s", _first_line(error))
        self._purge_at = time.monotonic() + (self.seconds if again else PURGE_SECONDS)

    # -- redaction -------------------------------------------------------------------------------------

    def _policy(self, customization: str) -> Policy:
        with self._changed:
            return self._policies.get(customization, Policy())

    def _redactor(self, customization: str) -> Redactor:
        kinds = self._policy(customization).redact
        if kinds not in self._redactors:
            self._redactors[kinds] = redactor(kinds)
        return self._redactors[kinds]

    def _redacted(self, record: TrafficRecord) -> TrafficRecord:
        redact = self._redactor(record.customization)
        return dataclasses.replace(
            record,
            messages=[
                {"role": message["role"], "content": self._clean(message["content"], redact)}
                for message in record.messages
            ],
            answer=self._clean(record.answer, redact),
            metadata={
                self._clean(name, redact): self._clean(value, redact)
                for name, value in record.metadata.items()
            },
        )

    @staticmethod
    def _clean(text: str, redact: Redactor) -> str:
        """Redacted, no longer than MAX_TEXT, and in characters that every database takes."""
        seen = MAX_TEXT + LONGEST_SECRET
        divided = len(text) > seen
        text = redact(text[:seen])[0]
        if divided:  # what that may have divided was not recognized
            text = text[:-LONGEST_SECRET]
        if divided or len(text) > MAX_TEXT:  # shorter than any that is whole
            text = text[: MAX_TEXT - len(CUT) - 1] + CUT
        return text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


__all__ = ["Busy", "Policy", "RedactionUnavailable", "TrafficWriter", "Unavailable", "UnknownRequest"]
