"""One connection with one channel, on a thread of its own; made again whenever it breaks."""

from __future__ import annotations

import logging
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pika
import pika.exceptions as faults

from kvrep.errors import (
    AuthenticationFailed,
    ConfigurationMismatch,
    Error,
    PeerUnavailable,
    PermissionDenied,
    ProtocolError,
    ReplicationError,
    again,
)

__all__ = ["Link", "Place"]

log = logging.getLogger("kvrep.brokers")

BACKOFF_MIN_S, BACKOFF_MAX_S = 0.05, 5.0
STABLE_S = 2.0
"""A connection that lasted so long begins a new count of failures."""
CLOSE_GRACE_S = 0.5
DROP_S = 0.1
"""What a close that ran out of time still gets for the goodbye itself."""
REFUSED, NOT_FOUND, LOCKED, MISMATCH = 403, 404, 405, 406
NOT_ALLOWED = 530


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a broker is and how to get in."""

    shown: str
    hosts: tuple[tuple[str, int], ...]
    user: str
    password: str = field(repr=False)
    vhost: str
    tls: bool
    cafile: str
    heartbeat_s: int
    timeout_s: int
    stream: bool
    queue_type: str

    def parameters(self, attempt: int) -> pika.ConnectionParameters:
        """For pika; the hosts take turns."""
        host, port = self.hosts[attempt % len(self.hosts)]
        tls = None
        if self.tls:
            context = ssl.create_default_context(cafile=self.cafile or None)
            tls = pika.SSLOptions(context, host)
        return pika.ConnectionParameters(
            host=host,
            port=port,
            virtual_host=self.vhost,
            credentials=pika.PlainCredentials(self.user, self.password),
            heartbeat=self.heartbeat_s,
            socket_timeout=self.timeout_s,
            stack_timeout=self.timeout_s,
            connection_attempts=1,
            ssl_options=tls,
            client_properties={"connection_name": "kvrep"},
        )

    @property
    def queue_arguments(self) -> dict[str, Any]:
        """What a queue, or stream, is made with."""
        if self.stream:
            return {"x-queue-type": "stream"}
        # One reader at a time keeps the order; the others stand by.
        return {"x-queue-type": self.queue_type, "x-single-active-consumer": True}


class Link:
    """Keeps a channel open and its queue declared.

    ``on_ready(channel)`` and ``on_lost()`` are called on the thread; so is everything given to :meth:`call`.
    """

    def __init__(
        self,
        place: Place,
        queue: str,
        kind: str,
        on_ready: Callable[[Any], None],
        on_lost: Callable[[], None],
    ) -> None:
        self.problem = ""
        """Why there is no connection now; empty when there is one."""
        self.reconnects = 0
        self.blocked = ""
        """Why the broker takes nothing from publishers now, if it says so."""
        self.full = ""
        """Why it has refused a message, until that is sent again."""
        self.on_ended: Callable[[Error], None] = lambda error: None
        """Called with what no new connection can mend."""
        self.on_unblocked: Callable[[], None] = lambda: None
        self._place, self._queue = place, queue
        self._on_ready, self._on_lost = on_ready, on_lost
        self._passive = True
        self._ready = False
        self._fault: Error | None = None
        self._settled = threading.Event()
        """The first connection stands, or cannot be made."""
        self._first = True
        self._stop = threading.Event()
        # Protects the connection against use after its loop is closed.
        self._lock = threading.Lock()
        self._connection: Any = None
        self._thread = threading.Thread(target=self._run, name=f"kvrep-rabbitmq-{kind}", daemon=True)

    def open(self) -> None:
        """Connect; raises at once what keeps the first connection from being made."""
        place = self._place
        self._thread.start()
        self._settled.wait(place.timeout_s * (len(place.hosts) + 1))
        if not self._ready and self._first:
            self.close(CLOSE_GRACE_S)
            raise again(self._fault) if self._fault else self._silent()

    def _silent(self) -> Error:
        text = f"{self._place.shown} does not answer within {self._place.timeout_s} s"
        return PeerUnavailable(text, hint="check host and port in the address", address=self._place.shown)

    # -- from other threads ------------------------------------------------------------------------

    def call(self, action: Callable[[], None]) -> None:
        """Have ``action`` called on the thread; not at all when there is no connection."""
        with self._lock:
            if self._connection is not None:
                self._connection.ioloop.add_callback_threadsafe(action)

    def close(self, timeout_s: float) -> None:
        """Say goodbye, which what was sent before precedes, and end the thread."""
        self._stop.set()
        self.call(self._goodbye)
        self._thread.join(timeout_s)
        if self._thread.is_alive():  # the other end says nothing
            self.call(self._abort)
            self._thread.join(CLOSE_GRACE_S)

    def _goodbye(self) -> None:
        connection = self._connection
        if connection is None or connection.is_closing or connection.is_closed:
            return
        connection.close()

    def _abort(self) -> None:
        connection = self._connection
        if connection is not None:
            connection.ioloop.stop()

    # -- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        failures = 0
        for attempt in self._attempts():
            self._ready = False
            self._fault = None
            began = time.monotonic()
            try:
                self._once(attempt)
            except Exception as error:
                log.exception("%s: the connection failed", self._place.shown)
                self._fault = ReplicationError(f"{self._place.shown}: {error!r}")
            was_ready, self._ready = self._ready, False
            if self._stop.is_set():
                break
            self._tell_lost(was_ready)
            if was_ready and self._unmendable():
                break
            if self._first and not was_ready and (attempt + 1 >= len(self._place.hosts) or self._hopeless()):
                break
            failures = 0 if time.monotonic() - began >= STABLE_S else failures + 1
            limit = min(BACKOFF_MAX_S, BACKOFF_MIN_S * 2 ** min(failures, 10))
            self._stop.wait(random.uniform(limit / 2, limit))
        self._settled.set()

    def _attempts(self) -> Iterator[int]:
        attempt = 0
        while not self._stop.is_set():
            yield attempt
            attempt += 1

    def _unmendable(self) -> bool:
        """Whether what is there is not what it was taken for; tells it."""
        if not isinstance(self._fault, ConfigurationMismatch):
            return False
        self.on_ended(self._fault)
        return True

    def _hopeless(self) -> bool:
        return isinstance(self._fault, AuthenticationFailed | PermissionDenied | ConfigurationMismatch)

    def _tell_lost(self, was_ready: bool) -> None:
        fault = self._fault or PeerUnavailable(f"{self._place.shown} closed the connection", address="")
        if str(fault) != self.problem and not self._first:
            log.warning("%s", fault)
        self.problem, self.blocked, self.full = str(fault), "", ""
        if was_ready:
            self._on_lost()

    def _once(self, attempt: int) -> None:
        """One connection, from its beginning to its end."""
        try:
            parameters = self._place.parameters(attempt)
        except (OSError, ValueError) as error:
            self._fault = ConfigurationMismatch(
                f"{self._place.shown}: {error}", option="cafile", given=self._place.cafile
            )
            return
        connection = pika.SelectConnection(
            parameters,
            on_open_callback=self._on_open,
            on_open_error_callback=self._on_failed,
            on_close_callback=self._on_closed,
        )
        with self._lock:
            self._connection = connection
        try:
            if not self._stop.is_set():
                connection.ioloop.start()
        finally:
            with self._lock:
                self._connection = None
            drop_socket(connection)
            connection.ioloop.close()

    def _on_open(self, connection: Any) -> None:
        connection.add_on_connection_blocked_callback(self._on_blocked)
        connection.add_on_connection_unblocked_callback(self._on_unblocked)
        connection.channel(on_open_callback=self._on_channel)

    def _on_failed(self, connection: Any, error: Exception) -> None:
        self._fault = self._mapped(error)
        connection.ioloop.stop()

    def _on_closed(self, connection: Any, error: Exception) -> None:
        self._fault = self._fault or self._mapped(error)
        connection.ioloop.stop()

    def _on_blocked(self, _connection: Any, method: Any) -> None:
        self.blocked = str(method.method.reason or "no reason given")
        log.warning("%s blocks publishers: %s", self._place.shown, self.blocked)

    def _on_unblocked(self, _connection: Any, _method: Any) -> None:
        self.blocked = ""
        self.on_unblocked()

    def _on_channel(self, channel: Any) -> None:
        channel.add_on_close_callback(self._on_channel_closed)

        def ready(_: Any) -> None:
            self._on_declared(channel)

        if self._passive:
            channel.queue_declare(self._queue, passive=True, callback=ready)
        else:
            arguments = self._place.queue_arguments
            channel.queue_declare(self._queue, durable=True, arguments=arguments, callback=ready)

    def _on_declared(self, channel: Any) -> None:
        self._passive = True
        if not self._first:
            self.reconnects += 1
        self._ready, self._first, self.problem = True, False, ""
        self._on_ready(channel)
        self._settled.set()

    def _on_channel_closed(self, channel: Any, error: Exception) -> None:
        code = getattr(error, "reply_code", 0)
        if code == NOT_FOUND and self._passive and not self._ready:
            self._passive = False
            channel.connection.channel(on_open_callback=self._on_channel)
            return
        self._fault = self._fault or self._mapped(error)
        self._goodbye()

    def break_off(self, reason: str) -> None:
        """End this connection and make a new one. On the thread."""
        self._fault = ReplicationError(reason)
        self._goodbye()

    # -- errors ------------------------------------------------------------------------------------

    def _mapped(self, error: BaseException) -> Error:
        """The same in words of ours."""
        cause, place = root_cause(error), self._place
        where, code = place.shown, getattr(cause, "reply_code", 0)
        if isinstance(cause, faults.ProbableAuthenticationError | faults.AuthenticationError):
            text = f"{where} refused user {place.user!r}"
            return AuthenticationFailed(text, hint="check user and password in the address")
        if isinstance(cause, faults.ProbableAccessDeniedError) or code in (NOT_ALLOWED, REFUSED):
            text = f"{where}: user {place.user!r} may not use {self._queue!r} in virtual host {place.vhost!r}: {cause}"
            return PermissionDenied(
                text, hint="check the virtual host in the address and the user's permissions"
            )
        if code in (MISMATCH, LOCKED):
            text = f"{where}: {self._queue!r} exists and is something else: {cause}"
            return ConfigurationMismatch(
                text,
                hint="give another topic, or the scheme of what is there",
                option="topic",
                given=self._queue,
            )
        if isinstance(cause, ssl.SSLError):
            return AuthenticationFailed(f"TLS with {where} failed: {cause}", hint="check cafile and the port")
        if isinstance(cause, faults.IncompatibleProtocolError):
            return ProtocolError(f"{where} does not speak AMQP 0-9-1", hint="check the port in the address")
        if isinstance(cause, socket.gaierror):
            text = f"{where}: the host name is not known: {cause}"
            return PeerUnavailable(text, hint="check the host in the address", address=where)
        text = f"{where} cannot be reached: {cause!r}" if not self._ready else f"{where} is gone: {cause!r}"
        return PeerUnavailable(text, hint="check host and port, and that it runs", address=where)


def root_cause(error: BaseException) -> BaseException:
    """What pika's nested exceptions are about in the end."""
    while True:
        inner: Any = getattr(error, "exceptions", None)
        if inner:
            error = inner[-1]
            continue
        inner = getattr(error, "exception", None)
        if inner is None and error.args and isinstance(error.args[0], BaseException):
            inner = error.args[0]
        if not isinstance(inner, BaseException):
            return error
        error = inner


def drop_socket(connection: Any) -> None:
    """Let go of the socket of a connection whose loop has ended without a goodbye: pika does it in the loop."""
    transport = getattr(connection, "_transport", None)
    if transport is None:
        return
    transport.abort()
    loop = connection.ioloop
    loop.call_later(DROP_S, loop.stop)
    loop.start()
