"""The client of a request, as the guard of its route found it."""

from __future__ import annotations

from aiohttp import web

from imagegen.accounts.client import Client
from imagegen.web.context import SERVICES
from imagegen.web.http.forwarded import client_address

CLIENT = web.RequestKey("client", Client)


def client_of(request: web.Request) -> Client:
    """Return the client; without a guard it is known by its address alone."""
    client = request.get(CLIENT)
    if client is None:
        client = Client(client_address(request, request.app[SERVICES].trusted_hops))
        request[CLIENT] = client
    return client
