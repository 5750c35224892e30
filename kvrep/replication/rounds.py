"""Rounds of questions by which a primary makes sure, for a linearizable read, that it still is one.

A round that begins after a read began and is answered by W data voters (this node included; W copies are
what a commit needs) shows that at some moment in between no other node could have committed anything: a
promotion fences F = d - W + 1 data voters, so it would have met one of those that answered, and that one
would have promised the higher epoch. Reads that begin before the round is first sent share it.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvrep.model.configuration import Configuration

__all__ = ["Rounds"]


class Rounds:
    """One per epoch of this node as primary. Not thread-safe."""

    __slots__ = ("_answered", "_self", "_sent", "wanted")

    def __init__(self, store_id: bytes) -> None:
        self._self = store_id
        self._answered: dict[bytes, int] = {}
        self._sent = 0
        self.wanted = 0
        """The newest round that somebody waits for; 0 before the first."""

    def ask(self) -> int:
        """A read begins: the round whose answers count for it, which nobody has been asked yet."""
        if self._sent == self.wanted:
            self.wanted += 1
        return self.wanted

    def sending(self) -> int:
        """The round to ask a follower for now. Reads that begin later need another one."""
        self._sent = self.wanted
        return self.wanted

    def answer(self, store_id: bytes, number: int) -> bool:
        """A follower answered; whether that says anything new. One that cannot be is ``ValueError``."""
        if number > self._sent:
            raise ValueError(f"round {number} has not begun")
        if number <= self._answered.get(store_id, 0):
            return False
        self._answered[store_id] = number
        return True

    def confirmed(self, number: int, rules: Iterable[Configuration]) -> bool:
        """Whether enough have answered, by every one of ``rules`` (two while one replaces the other)."""
        return all(self._count(number, rule) >= rule.copies for rule in rules)

    def _count(self, number: int, rule: Configuration) -> int:
        """The data voters that have answered that round or a later one; this node is one of them."""
        voters = (v.store_id for v in rule.voters if v.counts)
        found = sum(i == self._self or self._answered.get(i, 0) >= number for i in voters)
        return found if rule.voters else 1
