"""Service without an answering DNS server: names hang in c-ares and in the system's resolver."""

import os
import socket
import time

import aiodns

from imagegen.process import main

asked = socket.getaddrinfo


def hang(host: object, *args: object, **hints: object) -> object:
    if str(host).endswith(".example.com"):
        time.sleep(15)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    return asked(host, *args, **hints)


if __name__ == "__main__":
    socket.getaddrinfo = hang
    made = aiodns.DNSResolver

    def silent(_nameservers: object = None, **options: object) -> aiodns.DNSResolver:
        return made([os.environ["SILENT_DNS"]], **options)

    aiodns.DNSResolver = silent
    main()
