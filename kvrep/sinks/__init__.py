"""Secondary systems, and the agents that keep them up to date.

::

    interface   Sink, Place, DeadLetter: what a secondary has to be able to do
    tables      how a keyspace becomes a table
    memory, sqlite, postgres, store      the secondaries
    ordering    in which order events take effect (pure)
    delays      how late, how fast, until when (pure)
"""
