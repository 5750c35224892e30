"""kvrep: a key-value store that lives inside a Python process and copies itself to followers."""

__all__: list[str] = []
