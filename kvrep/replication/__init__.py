"""Replication decisions as plain values: events in, actions out. No I/O, no clock, no thread, no chance."""
