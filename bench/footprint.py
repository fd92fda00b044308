"""Start time and memory: help, exec to the first 200 with the embedded Redis, idle, and with many tasks queued."""

from __future__ import annotations

import json
import subprocess
import sys
import time

from bench.http import GENERATE, Requests, load
from bench.report import Options, Table, command, spread
from bench.servers import RedisServer, Service

PROMPT_CHARS = 300
MIB = 2**20


def main(options: Options) -> None:
    starts, idle, helps = [], [], []
    for _ in range(options.runs):
        began_at = time.perf_counter()
        subprocess.run([sys.executable, "run.py", "--help"], stdout=subprocess.DEVNULL, check=True)
        helps.append(time.perf_counter() - began_at)
        with Service() as service:
            starts.append(service.start_s)
            idle.append(service.rss_bytes / MIB)
    count = options.count(200, 10_000)
    with RedisServer() as server, Service(server.url, SANDBOX_DELAY="3600", WORKER_CONCURRENCY="1") as service:
        before = server.used_bytes()
        prompts = (f"a lighthouse {number} ".ljust(PROMPT_CHARS, "x") for number in range(count))
        queued = [json.dumps({"prompt": prompt}) for prompt in prompts]
        load(service.port, 60.0, Requests("POST", GENERATE, queued))
        queued_mib, per_task = service.rss_bytes / MIB, (server.used_bytes() - before) / count
    table = Table("Start and memory", "what", "figure")
    table.add("imagegen --help, s min / median / max", spread(helps, ".2f"))
    table.add("exec to first 200 with the embedded Redis, s min / median / max", spread(starts, ".2f"))
    table.add("idle process, MiB min / median / max", spread(idle, ".0f"))
    table.add(f"process with {count:,} tasks queued, prompts of {PROMPT_CHARS} characters, MiB", f"{queued_mib:.0f}")
    table.add("Redis bytes a queued task", f"{per_task:,.0f}")
    table.show(command("footprint", options))
