"""Disks of a given size, one for each node: tmpfs mounts, which can be filled. Needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

from kvrep.testing.namespaces import NotPrivileged

__all__ = ["SmallDisks"]


class SmallDisks:
    """``size_bytes`` each; ``None``: there are none."""

    def __init__(self, size_bytes: int | None) -> None:
        self._size_bytes = size_bytes
        self._mounts: list[Path] = []

    def mount(self, path: Path) -> None:
        """A disk at ``path``, which is made. ``NotPrivileged`` where that is not allowed."""
        if self._size_bytes is None:
            return
        if os.geteuid() != 0:
            raise NotPrivileged("disk_bytes needs root, to mount a tmpfs for every node")
        path.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={self._size_bytes}", "tmpfs", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotPrivileged(f"a tmpfs cannot be mounted: {done.stderr.strip()}")
        self._mounts.append(path)

    def fill(self, path: Path, leave_bytes: int) -> None:
        """Take all room on the disk at ``path`` but for ``leave_bytes``."""
        if path not in self._mounts:
            raise ValueError(
                "fill_disk needs a cluster made with disk_bytes=, which gives nodes their own disks"
            )
        free = shutil.disk_usage(path).free - leave_bytes
        if free > 0:
            fd = os.open(path / "ballast", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
            try:
                os.posix_fallocate(fd, os.fstat(fd).st_size, free)
            finally:
                os.close(fd)

    def free(self, path: Path) -> None:
        """Give back what :meth:`fill` took."""
        (path / "ballast").unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount all of them, also when one cannot be."""
        with ExitStack() as each:
            for path in self._mounts:
                each.callback(subprocess.run, ["umount", "-l", str(path)], check=True)
