"""How nodes talk: the only place that knows grpc.

::

    interface   what the domain implements (Service, Session) and uses (Transport, Server,
    Connection, Stream) wire        replication messages <-> bytes, everything from a peer checked
    calls       unary calls and scans <-> bytes faults      errors <-> bytes, so that a peer raises
    what this node raised network     GrpcTransport: the real thing, made of server, client,
    security memory      MemoryTransport: its twin without sockets, for tests

Importing this package imports nothing; ``interface`` and ``memory`` do not import grpc.
"""
