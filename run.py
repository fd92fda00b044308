"""Starts the service: `python run.py`; with arguments, it is the command `imagegen`."""

import sys

from imagegen.cli import main

if __name__ == "__main__":
    sys.exit(main())
