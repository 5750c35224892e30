"""librdkafka's mock cluster as a process: prints its addresses, ends when standard input does."""

from __future__ import annotations

import logging
import sys

from confluent_kafka import Producer


def main() -> None:
    quiet = logging.getLogger("mock")
    quiet.setLevel(logging.CRITICAL)
    producer = Producer({"bootstrap.servers": "mock:1", "test.mock.num.brokers": 3}, logger=quiet)
    brokers = producer.list_topics(timeout=10).brokers.values()
    print(",".join(f"{broker.host}:{broker.port}" for broker in brokers), flush=True)
    while sys.stdin.buffer.read(4096):
        pass


if __name__ == "__main__":
    main()
