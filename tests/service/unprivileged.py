"""Service without capabilities: as root, it has the rights of a normal user.

`unprivileged.py MODE` gives its working folder this mode first.
"""

import ctypes
import os
import sys

from imagegen.process import main

_VERSION_3 = 0x20080522
"""Of linux/capability.h: two sets of 32 bits each."""

if __name__ == "__main__":
    os.chmod(".", int(sys.argv.pop(), 8))  # noqa: PTH101 - of the working folder, however it is called
    header, none = (ctypes.c_uint32 * 2)(_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, none) != 0:
        raise OSError(ctypes.get_errno(), "capset")
    raise SystemExit(main())
