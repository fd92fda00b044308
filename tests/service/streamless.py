"""Service that begins without the standard streams of these numbers, as Python does if its parent has closed them."""

import os
import sys

from imagegen.process import main

if __name__ == "__main__":
    for number in map(int, sys.argv[1:]):
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)
    raise SystemExit(main())
