"""A Kafka cluster: how to get in, its topics, and its errors in words of ours."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import confluent_kafka as ck
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from kvrep.brokers.url import BrokerUrl
from kvrep.errors import (
    AuthenticationFailed,
    Error,
    Fenced,
    PeerUnavailable,
    PermissionDenied,
    ReplicationError,
    ValueTooLarge,
    again,
)

__all__ = ["HOPELESS", "MESSAGE_BYTES_MAX", "Cluster", "Faults", "client_log"]

log = logging.getLogger("kvrep.brokers")
# librdkafka's own log lines; what matters in them comes as errors, too.
client_log = logging.getLogger("kvrep.brokers.librdkafka")
client_log.setLevel(logging.CRITICAL)

PORT = 9092
MESSAGE_BYTES_MAX = 8 << 20
ASK_S, PAUSE_S = 0.5, 0.02
_E = ck.KafkaError
_DENIED = (
    _E.TOPIC_AUTHORIZATION_FAILED,
    _E.GROUP_AUTHORIZATION_FAILED,
    _E.CLUSTER_AUTHORIZATION_FAILED,
    _E.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
)
_SUPERSEDED = (_E._FENCED, _E.INVALID_PRODUCER_EPOCH, _E.PRODUCER_FENCED)
HOPELESS = (*_DENIED, _E._AUTHENTICATION)
"""Codes of what a reader does not wait to pass."""


class Cluster:
    """What an address says, for librdkafka. Any thread."""

    def __init__(self, url: BrokerUrl) -> None:
        self.shown = str(url)
        self.timeout_s = url.number("timeout_s", 10, 1, 3600)
        self.linger_ms = url.number("linger_ms", 5, 0, 10_000)
        self._partitions = url.number("partitions", -1, 1, 10_000)
        self._replicas = url.number("replicas", -1, 1, 100)
        self._user = url.user
        self.settings: dict[str, Any] = {
            "bootstrap.servers": ",".join(_place(host, port) for host, port in url.hosts),
            "security.protocol": ("SASL_" if url.user else "")
            + ("SSL" if url.scheme == "kafkas" else "PLAINTEXT"),
            "client.id": "kvrep",
            "reconnect.backoff.ms": 50,
            "reconnect.backoff.max.ms": 2000,
            "message.max.bytes": MESSAGE_BYTES_MAX,
            "allow.auto.create.topics": True,
        }
        mechanism = url.choice("sasl", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
        if url.user:
            self.settings |= {
                "sasl.mechanism": mechanism,
                "sasl.username": url.user,
                "sasl.password": url.password,
            }
        if url.options.get("cafile"):
            self.settings["ssl.ca.location"] = url.options["cafile"]

    # -- topics ------------------------------------------------------------------------------------

    def partitions(self, client: Any, topic: str, faults: Faults) -> list[int]:
        """The topic's partitions, as soon as the cluster tells; raises what keeps it from telling."""
        deadline = time.monotonic() + self.timeout_s
        tried = False
        while True:
            faults.look(client)
            try:
                found = client.list_topics(topic, timeout=ASK_S).topics[topic]
            except ck.KafkaException as error:
                fault = self.mapped(error.args[0])
                if isinstance(fault, AuthenticationFailed | PermissionDenied):
                    raise fault from error
            else:
                if found.error is None and found.partitions:
                    return sorted(found.partitions)
                fault = self.mapped(found.error) if found.error else ReplicationError("no partitions yet")
                if isinstance(fault, PermissionDenied):
                    raise fault
                if not tried and found.error and found.error.code() == _E.UNKNOWN_TOPIC_OR_PART:
                    tried = True
                    self._create(topic)
            if time.monotonic() >= deadline:
                raise again(faults.last or fault)
            time.sleep(PAUSE_S)

    def _create(self, topic: str) -> None:
        """Make the topic; on a cluster that made it by itself meanwhile, that is no error."""
        admin = AdminClient(self.settings)
        new = NewTopic(topic, num_partitions=self._partitions, replication_factor=self._replicas)
        try:
            admin.create_topics([new], request_timeout=self.timeout_s)[topic].result(self.timeout_s)
        except ck.KafkaException as error:
            if error.args[0].code() != _E.TOPIC_ALREADY_EXISTS:
                log.info("%s: topic %r was not created: %s", self.shown, topic, error)

    # -- errors ------------------------------------------------------------------------------------

    @contextmanager
    def asked(self) -> Iterator[None]:
        """What librdkafka raises inside comes out in words of ours."""
        try:
            yield
        except ck.KafkaException as error:
            raise self.mapped(error.args[0]) from error

    def mapped(self, error: Any) -> Error:
        """A ``KafkaError`` in words of ours."""
        where, code, text = self.shown, error.code(), error.str()
        if code in (_E._AUTHENTICATION, _E.SASL_AUTHENTICATION_FAILED, _E._SSL):
            hint = "check user, password and sasl= in the address, and cafile= with kafkas://"
            return AuthenticationFailed(f"{where} refused user {self._user!r}: {text}", hint=hint)
        if code in _DENIED:
            return PermissionDenied(f"{where}: {text}", hint="check the topic and the user's permissions")
        if code == _E._RESOLVE:
            return PeerUnavailable(f"{where}: {text}", hint="check the host in the address", address=where)
        if code in _SUPERSEDED:
            hint = "end one of the two, or give each an id of its own"
            return Fenced(f"{where}: another publisher has this transactional id: {text}", hint=hint, epoch=0)
        if code in (_E.MSG_SIZE_TOO_LARGE, _E.RECORD_LIST_TOO_LARGE):
            return ValueTooLarge(f"{where}: {text}", hint="raise max.message.bytes of the topic")
        if code in (_E._TRANSPORT, _E._ALL_BROKERS_DOWN, _E._TIMED_OUT):
            hint = "check host and port, and that it runs"
            return PeerUnavailable(f"{where} cannot be reached: {text}", hint=hint, address=where)
        return ReplicationError(f"{where}: {text}")


class Faults:
    """What a client says outside of calls: its error callback, looked at by whoever waits for it."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.last: Error | None = None
        self.down = False
        self.fatal: Error | None = None

    def __call__(self, error: Any) -> None:
        if error.code() == _E._ALL_BROKERS_DOWN:
            self.down = True
            return
        self.last = self._cluster.mapped(error)
        if error.fatal():
            self.fatal = self.last

    def look(self, client: Any) -> None:
        """Have the callback called for what has come up; raise it if there is no hope."""
        client.poll(0)
        if self.last is not None and (self.down or isinstance(self.last, AuthenticationFailed)):
            raise again(self.last)

    def forget(self) -> None:
        self.last, self.down = None, False


def _place(host: str, port: int) -> str:
    return f"[{host}]:{port or PORT}" if ":" in host else f"{host}:{port or PORT}"
