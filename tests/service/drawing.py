"""Service that draws its images itself, unlike those of other tests, which draw quickly."""

from imagegen.process import main
from imagegen.providers.drawing import render
from tests.quick_drawing import RealDrawing

if __name__ == "__main__":
    render.Drawing = RealDrawing
    raise SystemExit(main())
