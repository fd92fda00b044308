"""Service without an answering DNS server: names hang in c-ares and in the system's resolver."""

import os
import socket
import time
from typing import Any

import aiodns

from imagegen.process import main

asked = socket.getaddrinfo


def hang(host: str, *args: Any, **hints: Any) -> Any:
    if host.endswith(".example.com"):
        time.sleep(15)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    return asked(host, *args, **hints)


if __name__ == "__main__":
    socket.getaddrinfo = hang  # type: ignore[assignment]  # it takes what the real one takes
    made = aiodns.DNSResolver

    def silent(_nameservers: object = None, **options: Any) -> aiodns.DNSResolver:
        return made([os.environ["SILENT_DNS"]], **options)

    aiodns.DNSResolver = silent  # type: ignore[assignment, misc]  # a function in place of a class
    main()
