"""A message broker of one's own: topics in a table of a SQLite file, for the processes of one machine.

With an entry point in the ``pyproject.toml`` of the package that it is in::

    [project.entry-points."kvrep.brokers"]
    table = "examples.table_broker:TableBroker"

everything that takes a broker's address takes ``table:///var/lib/messages.db?topic=orders``.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time

from kvrep.brokers import (
    EARLIEST,
    LATEST,
    STORED,
    BaseBroker,
    BasePublisher,
    BrokerUrl,
    Delivery,
    Message,
    Outstanding,
    Window,
)
from kvrep.errors import ClosedError, OpenError

LOCKED_S = 0.1
POLL_S = 0.01
TABLES = """
    PRAGMA journal_mode = WAL;
    CREATE TABLE IF NOT EXISTS messages (n INTEGER PRIMARY KEY, topic, id, key, headers, body);
    CREATE TABLE IF NOT EXISTS positions (topic, reader, n INTEGER, PRIMARY KEY (topic, reader));
"""


class TableBroker(BaseBroker):
    def __init__(self, url: BrokerUrl) -> None:
        super().__init__(url)
        self._path = "/" + url.path

    def _open_file(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, LOCKED_S, isolation_level=None, check_same_thread=False)
        db.executescript(TABLES)
        return db

    def _publisher(self, topic: str, window: Window) -> TablePublisher:
        return TablePublisher(self._open_file(), topic, window)

    def _subscriber(self, topic: str, group: str, start: str, prefetch: int) -> TableSubscriber:
        return TableSubscriber(self._open_file(), topic, group, start, prefetch)


class TablePublisher(BasePublisher):
    """What waits is written by a thread, all in one transaction; committed is confirmed."""

    def __init__(self, db: sqlite3.Connection, topic: str, window: Window) -> None:
        super().__init__(window)
        self._db, self._topic = db, topic
        self._waiting: list[tuple[Message, int]] = []
        self._problem = ""
        self._thread = threading.Thread(target=self._run, name="table-publisher", daemon=True)
        self._thread.start()

    def _send(self, message: Message, size: int) -> None:
        self._waiting.append((message, size))
        self._changed.notify_all()

    def _health(self) -> tuple[str, str]:
        return "connecting" if self._problem else "ready", self._problem

    def _disconnect(self, deadline: float) -> None:
        self._thread.join()
        self._db.close()

    def _run(self) -> None:
        while not self.closed:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self.closed)
                batch = list(self._waiting)
            try:
                self._store([message for message, _ in batch])
            except sqlite3.OperationalError as error:  # locked, or the disk is full: try again
                self._problem = str(error)
                continue
            with self._changed:
                del self._waiting[: len(batch)]
                self._problem = ""
                self._confirm(len(batch), sum(size for _, size in batch))

    def _store(self, messages: list[Message]) -> None:
        rows = [(self._topic, m.id, m.key, json.dumps(dict(m.headers)), m.body) for m in messages]
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany(
                "INSERT INTO messages (topic, id, key, headers, body) VALUES (?, ?, ?, ?, ?)", rows
            )


class TableSubscriber:
    """A position is a message's number in the table."""

    def __init__(self, db: sqlite3.Connection, topic: str, group: str, start: str, prefetch: int) -> None:
        self._topic, self._group, self._prefetch = topic, group, prefetch
        # Protects what follows.
        self._lock = threading.Lock()
        self._db = db
        self._outstanding = Outstanding()
        self.closed = False
        self._last = self._begin(start)

    def _begin(self, start: str) -> int:
        """The number behind which ``start`` is."""
        if start == EARLIEST:
            return 0
        if start == LATEST:
            return int(self._db.execute("SELECT coalesce(max(n), 0) FROM messages").fetchone()[0])
        if start == STORED:
            rows = self._db.execute(
                "SELECT n FROM positions WHERE topic = ? AND reader = ?", (self._topic, self._group)
            )
            return next((int(n) for (n,) in rows), 0)
        if not start.isdecimal():
            raise OpenError(f"not a position in a table: {start!r}")
        return int(start)

    def receive(self, max_messages: int, timeout_s: float) -> list[Delivery]:
        deadline = time.monotonic() + timeout_s
        while True:
            with self._lock:
                if self.closed:
                    raise ClosedError("the subscriber is closed")
                found = self._read(min(max_messages, self._prefetch - len(self._outstanding)))
            if found or time.monotonic() >= deadline:
                return found
            time.sleep(POLL_S)

    def _read(self, count: int) -> list[Delivery]:
        found = []
        for n, name, key, headers, body in self._db.execute(
            "SELECT n, id, key, headers, body FROM messages WHERE topic = ? AND n > ? ORDER BY n LIMIT ?",
            (self._topic, self._last, count),
        ):
            self._outstanding.add(n)
            self._last = n
            found.append(Delivery(Message(body, key, json.loads(headers), name), position=str(n), tag=n))
        return found

    def ack(self, delivery: Delivery, *, through: bool = True) -> None:
        with self._lock:
            if self.closed or not self._outstanding.ack(delivery.tag, through=through):
                return
            try:
                self._db.execute(
                    "INSERT OR REPLACE INTO positions VALUES (?, ?, ?)",
                    (self._topic, self._group, self._outstanding.done_through),
                )
            except sqlite3.OperationalError:
                pass  # locked: stored with the next ack, or received again

    def close(self) -> None:
        with self._lock:
            self.closed = True
            self._db.close()
