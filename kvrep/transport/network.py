"""The real transport: gRPC between machines."""

from __future__ import annotations

from kvrep.transport.client import GrpcConnection
from kvrep.transport.interface import MESSAGE_BYTES_MAX, Service
from kvrep.transport.security import TLS, Security
from kvrep.transport.server import GrpcServer

__all__ = ["TLS", "GrpcTransport", "Security"]


class GrpcTransport:
    """See :class:`kvrep.transport.interface.Transport`. Holds settings only; needs no closing.

    ``message_bytes_max`` must be above the largest value that calls and scans may carry.
    """

    def __init__(
        self,
        *,
        security: Security | None = None,
        message_bytes_max: int = MESSAGE_BYTES_MAX,
        max_calls: int = 16,
    ) -> None:
        self._security = security
        self._message_bytes_max = message_bytes_max
        self._max_calls = max_calls

    def serve(self, service: Service, listen: str, *, name: str, max_streams: int = 64) -> GrpcServer:
        return GrpcServer(
            service,
            listen,
            name=name,
            max_streams=max_streams,
            max_calls=self._max_calls,
            security=self._security,
            message_bytes_max=self._message_bytes_max,
        )

    def connect(self, address: str, *, name: str) -> GrpcConnection:
        return GrpcConnection(
            address,
            name=name,
            security=self._security,
            message_bytes_max=self._message_bytes_max,
        )
