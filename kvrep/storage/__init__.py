"""The local engine: log files, memtable, LMDB. The only place that knows lmdb and the log's files."""
