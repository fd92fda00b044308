"""Settings that are loaded from an environment, and their faults."""

from __future__ import annotations

import pytest

from imagegen.errors import SettingsError
from imagegen.settings import Settings

WEBHOOK_SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def load(**environ: str) -> Settings:
    return Settings.load(environ, dotenv=None)


def faults(**environ: str) -> dict[str, str]:
    with pytest.raises(SettingsError) as caught:
        load(**environ)
    return dict(line.split(": ", 1) for line in str(caught.value).splitlines())
