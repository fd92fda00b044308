"""Owns the OpenAPI document as a whole."""

from __future__ import annotations

from collections.abc import Iterable

from imagegen import __version__
from imagegen.web.openapi import compatible, images, service
from imagegen.web.openapi.builder import Builder
from imagegen.web.openapi.descriptions import INTRODUCTION, TAGS
from imagegen.web.openapi.parts import Json, Operation
from imagegen.web.openapi.webhooks import HOOKS

OPERATIONS = (*images.OPERATIONS, *compatible.OPERATIONS, *service.OPERATIONS)


def build(server: str = "/") -> Json:
    """Return the document, from scratch: some 50 ms of work. server: the base of all paths in it."""
    builder = Builder([*OPERATIONS, *HOOKS])
    document: Json = {
        "openapi": "3.1.0",
        "info": {
            "title": "imagegen",
            "version": __version__,
            "summary": "Paid image APIs as a durable asynchronous API.",
            "description": INTRODUCTION,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": server}],
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": _by_path(OPERATIONS, builder),
        "webhooks": _by_path(HOOKS, builder),
    }
    token = {"type": "http", "scheme": "bearer", "description": "The service's `ADMIN_TOKEN`."}
    return document | {"components": builder.components() | {"securitySchemes": {"admin": token}}}


def _by_path(operations: Iterable[Operation], builder: Builder) -> Json:
    paths: Json = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method] = builder.entry(operation)
    return paths
