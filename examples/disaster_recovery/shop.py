"""The primary site: a shop that takes orders, in a process of its own that will be killed.

Arguments: the folder of its store, the broker's address for the log, and the one for events. The number of the last
order that is acknowledged to its customer is printed. Acknowledged means: the broker has confirmed the log through it.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from itertools import count

import kvrep
from kvrep.codecs import JSON

PAUSE_S = 0.005


def main(folder: str, log_url: str, events_url: str) -> None:
    with kvrep.open(folder, name="near", listen="127.0.0.1:0") as db:
        orders = db.keyspace("orders", codec=JSON)
        with (
            kvrep.LogPublication([db.address], log_url, name="broker") as log,
            kvrep.Publication(db, events_url, feed="events", name="shop"),
        ):
            waiting: deque[tuple[int, kvrep.Position]] = deque()
            for number in count(1):
                order = {"customer": f"customer {number % 97}", "total": number % 500 + 0.5}
                waiting.append((number, orders.put(b"order-%06d" % number, order)))
                published, acknowledged = log.published, 0
                while waiting and waiting[0][1] <= published:
                    acknowledged, _ = waiting.popleft()
                if acknowledged:
                    print(acknowledged, flush=True)
                time.sleep(PAUSE_S)


if __name__ == "__main__":
    main(*sys.argv[1:])
