"""What an application's own tests, and kvrep's, use to break a store and to see whether it kept its word.

::

    history      records what clients did and were told
    checkers     linearizability, acknowledged loss, session guarantees, feed completeness
    crash        what a disk may hold after a power loss, at every point of a workload

Nothing in kvrep imports from here. ``pip install kvrep[testing]`` brings what it needs.
"""
