"""The command, without the standard streams of these numbers, as Python begins if its parent has closed them.

`streamless.py 12 keys list` is `imagegen keys list >&- 2>&-`.
"""

import os
import sys

from imagegen.cli import main

if __name__ == "__main__":
    for number in map(int, sys.argv[1]):
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)
    raise SystemExit(main(sys.argv[2:]))
