"""What an application's own tests, and kvrep's, use to break a store and to see whether it kept its word.

::

    plugin       pytest fixtures: kvrep_store, kvrep_cluster (installed with kvrep[testing])
    cluster      nodes, their links, faults on demand, recorded clients, checks
    nodes        a node in this process, or as a process of its own
    proxy        a TCP proxy that behaves like a bad network
    timeline     what happened on all nodes, in one order
    history      records what clients did and were told
    checkers     linearizability, acknowledged loss, session guarantees, feed completeness
    storecheck   one store: do log, LMDB and digests agree?
    crash        what a disk may hold after a power loss, at every point of a workload
                 (trace, disk: what was recorded, and the model it is played back on; crashcheck: the workers)
    simulate     whole clusters in virtual time, driven by one seed: python -m kvrep.testing.simulate

Nothing in kvrep imports from here. ``pip install kvrep[testing]`` brings what it needs.
"""
