"""What an application's own tests, and kvrep's, use to break a store and to see whether it kept its word.

::

    plugin       pytest fixtures: kvrep_store, kvrep_cluster (installed with kvrep[testing])
    cluster      nodes, their links, faults on demand, recorded clients, checks
    nodes        a node in this process, or as a process of its own
    embedded     … which is an application with a store inside, so that all of a store can be asked for
    proxy        a TCP proxy that behaves like a bad network
    namespaces   network namespaces for nodes that are processes; packets are cut by nftables
    timeline     what happened on all nodes, in one order
    history      records what clients did and were told
    checkers     linearizability, acknowledged loss, one primary an epoch, sessions, feed completeness
    storecheck   one store: do log, LMDB and digests agree?
    crash        what a disk may hold after a power loss, at every point of a workload
                 (trace, disk: what was recorded, and the model it is played back on; crashcheck: the workers)
    soak         a cluster under mixed load and random faults, for as long as you like:
                 python -m kvrep.testing.soak
    simulate     whole clusters in virtual time, driven by one seed: python -m kvrep.testing.simulate

Nothing in kvrep imports from here. ``pip install kvrep[testing]`` brings what it needs.
"""
