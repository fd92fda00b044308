"""Service that compares its settings with those of the other instances at once."""

from imagegen.process import main
from imagegen.worker import peer_settings

if __name__ == "__main__":
    peer_settings.LASTING_S = 0.1
    raise SystemExit(main())
