"""Command line of the emulator."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence

from . import faults
from .base_emulator import serve
from .fault_schedule import UnknownFault
from .generation import IMAGE_MODES
from .jobs import DIALECTS
from .together_emulator import Emulator, Options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT. Return 2 if it can't start."""
    try:
        emulator = Emulator(_options(arguments))
        asyncio.run(serve(emulator))
    except (OSError, OverflowError, UnknownFault) as failure:
        sys.stderr.write(f"the emulator can't start: {failure}\n")
        return 2
    return 0


def _options(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m imagegen.emulator",
        description="Together's image endpoint on this machine. Set TOGETHER_API_URL to its address, and any key. With "
        "PROVIDER=openai and OPENAI_API_URL it is OpenAI's (models named gpt-image-…) or, with --dialect, a relay's.",
        epilog="Faults: " + ", ".join(faults.names()),
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8787, help="0 takes a free one (default %(default)s)")
    add("--delay", type=_not_negative, default=0.0, metavar="S", help="seconds before each answer")
    add("--fault", metavar="NAME", help="what each call gets, options after it: '429 retry_after=2'")
    add("--fail-rate", type=_not_negative, metavar="R", help="only this share (0 to 1) of the calls; fault 500 if none")
    add("--seed", type=int, help="makes the share of failures and the ids repeatable")
    add("--rate-per-minute", type=_positive, metavar="N", help="the rate limit, enforced by the second")
    add(
        "--image", choices=IMAGE_MODES, default="jpeg", help="unless asked for; tiny: 8x8 PNG; none: links lead nowhere"
    )
    add("--no-image", action="store_const", const="none", dest="image", help="the same as --image none")
    add("--key", help="the only key that is accepted (default: any)")
    add("--link-ttl", type=_not_negative, default=3600.0, metavar="S", help="seconds that image links live")
    add("--dialect", choices=DIALECTS, help="each call begins a job, as at this kind of relay (default: none)")
    add("--serve-model", action="append", default=[], metavar="ID", help="a vanished model that is served all the same")
    options = parser.parse_args(arguments)
    return Options(
        host=options.host,
        port=options.port,
        delay_s=options.delay,
        fault=options.fault or (None if options.fail_rate is None else "500"),
        fail_rate=1.0 if options.fail_rate is None else options.fail_rate,
        seed=options.seed,
        rate_per_minute=options.rate_per_minute,
        image=options.image,
        key=options.key,
        link_ttl_s=options.link_ttl,
        revived=tuple(options.serve_model),
        dialect=options.dialect,
    )


def _not_negative(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
