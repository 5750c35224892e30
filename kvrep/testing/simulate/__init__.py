"""A whole cluster in one thread, in virtual time, driven by one seed: ``python -m kvrep.testing.simulate``.

What decides is the real code: the election, promotions, joins, sender and receiver, the counting of acks,
the rule of promises, the records' codec. What carries it out in the product (threads, gRPC, LMDB, files) is
played by small shells on simulated disks, networks and clocks::

    clock        virtual time; clocks that run fast, slow, and jump
    network      calls and streams that are lost, late, doubled, cut in one direction
    disk         forgets what was not synced; full, failing, slow
    node         a process, its disk, its role        following, feeding, electing, promoting: its shells
    world        the cluster, who writes, what was ever acknowledged
    invariants   what must hold after every step
    plan         what goes wrong, drawn from the seed
    faults       deliberate mistakes in the code under test: are they found?
    run, command one seed; many of them

``docs/testing.md`` says what is modelled and what is not.
"""

from kvrep.testing.simulate.faults import PLANTS
from kvrep.testing.simulate.run import Outcome, run_seed

__all__ = ["PLANTS", "Outcome", "run_seed"]
