"""A soak: a cluster of processes under mixed load and random faults, everything checked and watched.

``python -m kvrep.testing.soak --help`` explains it.

::

    run      one soak from beginning to end
    load     clients that write and read, what they were told, and the checks of it
    faults   what is broken, when, and how it is mended
    watch    memory, descriptors, threads, disk and lag of every node over time; what grows
    report   the result as text
    picture  the result as one SVG
"""
