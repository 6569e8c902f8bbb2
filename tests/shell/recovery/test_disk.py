"""The real file system."""

import os

from streamlstm.recovery import disk
from streamlstm.recovery.disk import Disk


def test_what_the_kernel_takes_in_several_pieces_arrives_whole(tmp_path):
    data = os.urandom(2 * disk._WRITE_BYTES + 17)

    with Disk().create(tmp_path / "file") as file:
        Disk().write(file, data)
        Disk().write(file, b"more")

    assert (tmp_path / "file").read_bytes() == data + b"more"
