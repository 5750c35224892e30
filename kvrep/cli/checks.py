"""A list of checks, each passed or failed, and how it is shown. A check that could not run has failed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from kvrep.cli.console import style
from kvrep.cli.exits import Exit

__all__ = ["Check", "Report"]


@dataclass(slots=True)
class Check:
    """One thing that must be true."""

    name: str
    ok: bool
    detail: str


@dataclass(slots=True)
class Report:
    """What was checked, in order; ``notes`` are worth knowing and neither good nor bad."""

    subject: str
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, ok: bool, detail: str) -> bool:
        """Note a check; returns ``ok``."""
        self.checks.append(Check(name, ok, detail))
        return ok

    @property
    def ok(self) -> bool:
        return bool(self.checks) and all(check.ok for check in self.checks)

    @property
    def exit_code(self) -> Exit:
        return Exit.OK if self.ok else Exit.DAMAGED

    def lines(self) -> list[str]:
        """As people read it."""
        width = max((len(check.name) for check in self.checks), default=0)
        lines = [style(self.subject, "bold")]
        for check in self.checks:
            mark = style("ok    ", "green") if check.ok else style("FAILED", "red", "bold")
            lines.append(f"  {mark}  {check.name.ljust(width)}  {check.detail}")
        lines += [f"  {style('note', 'yellow')}    {note}" for note in self.notes]
        failed = sum(not check.ok for check in self.checks)
        total = len(self.checks)
        lines.append(
            style(f"all {total} checks passed", "green")
            if self.ok
            else style(f"{failed} of {total} checks FAILED", "red", "bold")
        )
        return lines

    def to_json(self) -> str:
        data: dict[str, Any] = {
            "subject": self.subject,
            "ok": self.ok,
            "checks": [{"name": c.name, "ok": c.ok, "detail": c.detail} for c in self.checks],
            "notes": self.notes,
        }
        return json.dumps(data)
