"""A whole cluster in one thread, in virtual time, driven by one seed."""
