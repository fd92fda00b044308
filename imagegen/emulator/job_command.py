"""Command line of the emulators of providers with jobs: `python -m imagegen.emulator.job_command fal --port 8790`."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final

from .base_emulator import serve
from .fault_schedule import UnknownFault
from .job_emulator import JobEmulator, JobOptions

CLASSES: Final = {
    "bfl": "BflEmulator",
    "dashscope": "DashScopeEmulator",
    "fal": "FalEmulator",
    "gemini": "GeminiEmulator",
    "replicate": "ReplicateEmulator",
    "siliconflow": "SiliconFlowEmulator",
}
"""By provider, which is the name of its module too."""


def make(provider: str, options: JobOptions) -> JobEmulator:
    """Return the emulator of a provider. Raises UnknownFault for a switch that it has not."""
    module = import_module(f"imagegen.emulator.{provider}")
    emulator: JobEmulator = getattr(module, CLASSES[provider])(options)
    return emulator


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT. Return 2 if it can't start."""
    provider, options = _parse(arguments)
    try:
        asyncio.run(serve(make(provider, options)))
    except (OSError, OverflowError, UnknownFault) as failure:
        sys.stderr.write(f"the emulator can't start: {failure}\n")
        return 2
    return 0


def _parse(arguments: Sequence[str] | None) -> tuple[str, JobOptions]:
    parser = argparse.ArgumentParser(description="An image provider with jobs on this machine, for tests and trials.")
    add, defaults = parser.add_argument, JobOptions()
    add("provider", choices=sorted(CLASSES))
    add("--host", default=defaults.host)
    add("--port", type=int, default=8790, help="0 takes a free one (default %(default)s)")
    add("--key", help="the only key that is accepted (default: any)")
    add("--job", type=float, default=defaults.job_s, metavar="S", help="seconds that a job runs")
    add(
        "--kept",
        type=float,
        default=defaults.kept_s,
        metavar="S",
        help="seconds that a job can be polled after its end",
    )
    add("--link-ttl", type=float, default=defaults.link_ttl_s, metavar="S", help="seconds that image links live")
    add("--image", choices=("png", "jpeg", "webp", "tiny"), default=defaults.image)
    add("--fault", help="the switch of each call: 'job end=failed'")
    add("--fail-rate", type=float, default=1.0, metavar="R", help="only this share (0 to 1) of the calls")
    add("--seed", type=int, help="makes chance and the ids repeatable")
    add("--price", type=float, default=defaults.price_usd, metavar="USD", help="of one image")
    add("--one-account", action="store_true", help="all keys belong to one account")
    options = parser.parse_args(arguments)
    return options.provider, JobOptions(
        host=options.host,
        port=options.port,
        key=options.key,
        job_s=options.job,
        kept_s=options.kept,
        link_ttl_s=options.link_ttl,
        image=options.image,
        fault=options.fault,
        fail_rate=options.fail_rate,
        seed=options.seed,
        price_usd=options.price,
        one_account=options.one_account,
    )


if __name__ == "__main__":
    sys.exit(main())
