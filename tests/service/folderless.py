"""Service of which the working folder is deleted."""

from pathlib import Path

from imagegen.process import main

if __name__ == "__main__":
    Path.cwd().rmdir()
    raise SystemExit(main())
