"""Threads, clocks and deadlines: the shells around the pure decisions."""
