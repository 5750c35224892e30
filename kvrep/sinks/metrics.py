"""What agents say, over HTTP: ``/status`` as JSON, ``/metrics`` in Prometheus form (``kvrep[metrics]``)."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol

from kvrep.errors import OpenError
from kvrep.sinks.delays import BUCKETS_S, Delays

__all__ = ["Reporter", "StatusServer", "exposition"]


class Reporter(Protocol):
    """An agent or a publication."""

    name: str
    delays: Delays

    def status(self) -> Any: ...


_GAUGES = {
    "consistent": "Whether the secondary is a consistent copy",
    "as_of_s": "The wall clock at the source that the secondary shows, in seconds since 1970",
    "backlog": "Records at the source that are not applied (not sent) yet",
    "catch_up_s": "Seconds until the backlog is gone at the present speed",
    "applied_per_s": "Changes applied each second",
    "published_per_s": "Events confirmed each second",
    "delay_p50_s": "From commit to effect, median of the last minutes",
    "delay_p99_s": "From commit to effect, 99th percentile of the last minutes",
    "parked": "Events that wait for a missing one",
    "dead_letters": "Changes that were put aside",
}
_COUNTERS = {
    "applied": "Changes applied",
    "published": "Events given to the broker",
    "confirmed": "Events that the broker confirmed",
    "commits": "Commits in the secondary",
    "snapshots": "Snapshots",
    "repeats": "Events that came again and were dropped",
    "asked": "How often missing events were asked for",
    "replays": "How often receivers asked for something again",
    "reconnects": "How often one side did not answer",
}


class _Collector:
    def __init__(self, reporters: Iterable[Reporter]) -> None:
        self._reporters = list(reporters)

    def collect(self) -> Iterable[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        statuses = [(r.name, r.status().to_json()) for r in self._reporters]
        for names, family in ((_GAUGES, GaugeMetricFamily), (_COUNTERS, CounterMetricFamily)):
            for name, text in names.items():
                metric = family(f"kvrep_agent_{_unit(name)}", text, labels=["name"])
                for who, status in statuses:
                    if status.get(name) is not None:
                        metric.add_metric([who], float(status[name]))
                if metric.samples:
                    yield metric
        state = GaugeMetricFamily(
            "kvrep_agent_state", "1 for the state that it is in", labels=["name", "state"]
        )
        for who, status in statuses:
            state.add_metric([who, status["state"]], 1.0)
        yield state
        delays = HistogramMetricFamily("kvrep_agent_delay_seconds", "From commit to effect", labels=["name"])
        for reporter in self._reporters:
            seen, buckets = 0, []
            for bound, count in zip(
                (*map(str, BUCKETS_S), "+Inf"), list(reporter.delays.histogram), strict=True
            ):
                seen += count
                buckets.append((bound, seen))
            delays.add_metric([reporter.name], buckets, reporter.delays.sum_s)
        yield delays


def _unit(name: str) -> str:
    """Prometheus spells units out."""
    if name.endswith("_per_s"):
        return name.removesuffix("_s") + "_second"
    return name.removesuffix("_s") + "_seconds" if name.endswith("_s") else name


def exposition(reporters: Iterable[Reporter]) -> bytes:
    """The metrics of agents and publications in Prometheus' text form. ``OpenError`` without its package."""
    try:
        from prometheus_client import CollectorRegistry, generate_latest
    except ImportError as error:
        raise OpenError(
            "metrics need the package prometheus-client", hint='pip install "kvrep[metrics]"'
        ) from error
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(reporters))
    text: bytes = generate_latest(registry)
    return text


class StatusServer:
    """Answers ``/status`` and ``/metrics`` on ``listen`` ("host:port", port 0 picks one) in threads of its own."""

    def __init__(self, reporter: Reporter, listen: str) -> None:
        host, colon, port = listen.rpartition(":")
        if not (colon and port.isdecimal()):
            raise OpenError(f"{listen!r} is not host:port", hint="such as 127.0.0.1:9464")

        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                try:
                    kind, body = _answer(reporter, self.path)
                except OpenError as error:
                    self.send_error(501, str(error))
                    return
                if not kind:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Requests are nobody's business."""

        try:
            self._server = ThreadingHTTPServer((host.strip("[]"), int(port)), Handler)
        except OSError as error:
            raise OpenError(f"cannot listen on {listen}: {error}", hint="choose another port") from error
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="kvrep-status", daemon=True
        )
        self._thread.start()

    @property
    def address(self) -> str:
        """Where it answers."""
        host, port = self._server.server_address[:2]
        return f"{host!s}:{port}"

    def close(self) -> None:
        """Stop answering. Idempotent."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _answer(reporter: Reporter, path: str) -> tuple[str, bytes]:
    """(content type, body); an empty type for a page that does not exist."""
    page = path.partition("?")[0]
    if page == "/status":
        return "application/json", json.dumps(reporter.status().to_json()).encode()
    if page == "/metrics":
        return "text/plain; version=0.0.4; charset=utf-8", exposition([reporter])
    return "", b""
