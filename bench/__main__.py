"""Command line of the benchmarks: `python -m bench [NAME …] [--full] [--runs N]`. PEERS=1: other queues too."""

from __future__ import annotations

import argparse
import os

from loguru import logger

from bench import commands, footprint, http, images, instructions, keys, rates, recovery, soak, studio, trace
from bench.peers import run as peers
from bench.report import Options, machine

BENCHES = {
    "queue": rates.queue,
    "latency": rates.latency,
    "pace": rates.pace,
    "commands": commands.main,
    "http": http.main,
    "keys": keys.main,
    "images": images.main,
    "instructions": instructions.main,
    "footprint": footprint.main,
    "recovery": recovery.main,
    "soak": soak.main,
    "studio": studio.main,
    "trace": trace.main,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measures imagegen on this machine.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)}; without any, all")
    parser.add_argument("--full", action="store_true", help="the long windows")
    parser.add_argument("--tiny", action="store_true", help="as little as shows that it works")
    parser.add_argument("--runs", type=int, default=3, help="of each timed figure")
    given = parser.parse_args()
    if unknown := set(given.names) - set(BENCHES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(BENCHES)}")
    logger.remove()
    print(machine())
    for name in given.names or BENCHES:
        beside = name == "queue" and bool(os.environ.get("PEERS"))
        bench = peers.queue if beside else BENCHES[name]
        bench(Options(runs=given.runs, full=given.full, tiny=given.tiny, peers=beside))


if __name__ == "__main__":
    main()
