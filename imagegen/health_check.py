"""Health check of the Docker image: `python -m imagegen.health_check` exits with 0 if `/healthz` answers with 200.

It reads HOST and PORT as the service does: with quotes, as `docker run --env-file` leaves them, empty, or in `.env`.
"""

from __future__ import annotations

import http.client
import ipaddress
import sys
from contextlib import suppress

from imagegen.errors import SettingsError
from imagegen.settings import read_listening

TIMEOUT_S = 4.0
"""Less than the time-out in the Dockerfile."""


def main() -> int:
    try:
        host, port = read_listening()
        connection = http.client.HTTPConnection(_reachable(host), port, timeout=TIMEOUT_S)
        connection.request("GET", "/healthz")
        status = connection.getresponse().status
    except (SettingsError, OSError, http.client.HTTPException) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0 if status == http.client.OK else 1


def _reachable(host: str) -> str:
    """Return loopback for an address that means all addresses of this machine."""
    with suppress(ValueError):
        address = ipaddress.ip_address(host)
        if address.is_unspecified:
            return "127.0.0.1" if address.version == 4 else "::1"
    return host


if __name__ == "__main__":
    sys.exit(main())
