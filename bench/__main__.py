"""Runs benchmarks: `python -m bench [NAME …] [--full] [--runs N]`."""

from __future__ import annotations

import argparse
import os
import sys

from loguru import logger

from bench import commands, footprint, http, rates
from bench.report import Options, machine

BENCHES = {
    "queue": rates.queue,
    "latency": rates.latency,
    "pace": rates.pace,
    "commands": commands.main,
    "http": http.main,
    "footprint": footprint.main,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measures imagegen on this machine.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)}; all where none is named")
    parser.add_argument("--full", action="store_true", help="the long windows")
    parser.add_argument("--tiny", action="store_true", help="so little that only the working is shown")
    parser.add_argument("--runs", type=int, default=3, help="of each timed figure")
    given = parser.parse_args()
    if unknown := set(given.names) - set(BENCHES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(BENCHES)}")
    if os.environ.get("PEERS"):
        sys.exit("PEERS: other queues are not measured here yet")
    logger.remove()
    print(machine())
    for name in given.names or BENCHES:
        BENCHES[name](Options(runs=given.runs, full=given.full, tiny=given.tiny))


if __name__ == "__main__":
    main()
