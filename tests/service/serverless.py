"""Service that finds no package with a server program: it searches nothing but PATH."""

import importlib.util

from imagegen.process import main

if __name__ == "__main__":
    importlib.util.find_spec = lambda *_names: None
    raise SystemExit(main())
