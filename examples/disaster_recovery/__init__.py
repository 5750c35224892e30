"""A primary site, a broker, a database and a far site; the primary site is lost. See docs/disaster-recovery.md."""
