"""Service without capabilities: as root, it has the rights of a normal user."""

import ctypes

from imagegen.process import main

_VERSION_3 = 0x20080522
"""Of linux/capability.h: two sets of 32 bits each."""

if __name__ == "__main__":
    header, none = (ctypes.c_uint32 * 2)(_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, none) != 0:
        raise OSError(ctypes.get_errno(), "capset")
    raise SystemExit(main())
