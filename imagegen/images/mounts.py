"""Mounts: whether the files in a folder are on a disk of this machine, or behind a network that may not answer."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
"""The mounts of this process: https://man7.org/linux/man-pages/man5/proc_pid_mountinfo.5.html"""

LOCAL_KINDS = frozenset(
    {"aufs", "bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "rootfs", "tmpfs", "xfs", "zfs"}
)
"""File systems that answer a `stat` at once, unlike NFS, SMB, FUSE, 9P, virtiofs, Ceph and Gluster."""

_MOUNT_POINT = 4
"""Index of the field with the mount point."""

_ESCAPED = re.compile(r"\\([0-7]{3})")


def is_local(folder: Path) -> bool:
    """Return whether a folder is on a file system of this machine, as far as the system shows it. Blocks."""
    place, kind, longest = f"{os.path.realpath(folder)}{os.sep}", "", 0
    with suppress(OSError):
        for line in MOUNTS.read_text(errors="surrogateescape").splitlines():
            fields, _, source = line.partition(" - ")
            if fields.count(" ") < _MOUNT_POINT:
                continue
            mounted = _ESCAPED.sub(lambda code: chr(int(code[1], 8)), fields.split(" ")[_MOUNT_POINT]).rstrip(os.sep)
            mounted += os.sep
            if len(mounted) >= longest and place.startswith(mounted):  # a later mount at the same point covers it
                longest, kind = len(mounted), source.split(" ")[0]
    return kind in LOCAL_KINDS
