"""Service that draws its images itself, unlike those of other tests, which draw quickly."""

from imagegen.process import main
from tests.quick_drawing import restore

if __name__ == "__main__":
    restore()
    raise SystemExit(main())
