"""What kvrep costs, measured against the bare ground it stands on.

Every figure is a ratio: kvrep against a bare reference (py-lmdb, a file, a gRPC stream) measured in the same
run, turn about, because the speed of a disk changes from minute to minute and from machine to machine while
the ratio hardly does. ``python -m benchmarks --help`` tells how to run it; docs/performance.md what came out.
"""
