"""Which folders are on a disk of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from imagegen.images import mounts

TABLE = r"""22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
28 27 0:30 / /data rw,relatime shared:7 - nfs4 server:/data rw
29 28 0:31 / /data/fast rw,relatime - tmpfs tmpfs rw
30 27 0:32 / /two\040words rw,relatime - fuse.sshfs host: rw
31 27 0:33 / /covered rw,relatime - xfs /dev/vdb rw
32 31 0:34 / /covered rw,relatime - cifs //server/share rw
33 27 254:3 / /windows rw,relatime - fuseblk /dev/vdc rw
garbled
"""


@pytest.mark.parametrize(
    ("folder", "local"),
    [
        ("/srv/images", True),
        ("/data", False),
        ("/data/images", False),
        ("/database", True),
        ("/data/fast/images", True),
        ("/two words/images", False),
        ("/covered/images", False),
        ("/windows", False),
    ],
)
def test_a_folder_is_on_the_last_mount_above_it(
    folder: str, local: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(TABLE.replace("garbled\n", ""))
    monkeypatch.setattr(mounts, "MOUNTS", table)
    assert mounts.is_local(Path(folder)) is local


def test_a_folder_is_not_known_as_local_without_a_table_of_mounts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounts, "MOUNTS", tmp_path / "missing")
    assert not mounts.is_local(tmp_path)


def test_a_line_that_can_not_be_read_does_not_make_a_mount_local(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "mountinfo"
    table.write_text("garbled\n" + TABLE)
    monkeypatch.setattr(mounts, "MOUNTS", table)
    assert not mounts.is_local(Path("/data/images"))
