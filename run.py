"""Starts the service: `python run.py`."""

import sys

from imagegen.app import main

if __name__ == "__main__":
    sys.exit(main())
