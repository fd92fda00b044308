"""HTTP: submits, cache hits and status reads a second beside a bare aiohttp handler, and tasks a second end to end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request

from bench.report import Options, Table, command, spread
from bench.servers import ROOT, Child, RedisServer, Service, answers, emulator, free_port, url_of

CONNECTIONS = 32


def load(port: int, seconds: float, method: str, path: str, bodies: list[str] | None = None) -> float:
    """Answers a second. Raises RuntimeError where one is no success."""
    wanted = json.dumps({"method": method, "path": path, "bodies": bodies or []})
    done = subprocess.run(
        [sys.executable, "-m", "bench.loader", str(port), str(CONNECTIONS), str(seconds)],
        input=wanted,
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    result = json.loads(done.stdout)
    if any(not status.startswith("2") for status in result["statuses"]):
        raise RuntimeError(f"{method} {path}: {result['statuses']}")
    return float(result["per_s"])


def bodies(count: int, mark: str) -> list[str]:
    return [json.dumps({"prompt": f"a lighthouse {mark} {number}"}) for number in range(count)]


def submit(port: int, prompt: str) -> str:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/images/generate?wait=30",
        json.dumps({"prompt": prompt}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return str(json.load(answer)["taskId"])


def bare(options: Options, seconds: float) -> dict[str, list[float]]:
    port = free_port()
    with Child([sys.executable, "-m", "bench.bare", str(port)]):
        while not answers(port, "/"):
            time.sleep(0.02)
        some = bodies(200_000, "bare")
        return {
            "POST": [load(port, seconds, "POST", "/", some) for _ in range(options.runs)],
            "GET": [load(port, seconds, "GET", "/") for _ in range(options.runs)],
        }


def main(options: Options) -> None:
    seconds = options.count(1, 3, 5)
    beside = bare(options, float(seconds))
    with RedisServer() as server, Service(server.url, SANDBOX_DELAY="0", WORKER_CONCURRENCY="1") as service:
        task_id = submit(service.port, "seen before")
        some = json.dumps({"prompt": "seen before"})
        found = {
            "cache-hit submits": (
                "POST",
                [
                    load(service.port, seconds, "POST", "/api/images/generate", [some] * 200_000)
                    for _ in range(options.runs)
                ],
            ),
            "status reads": (
                "GET",
                [load(service.port, seconds, "GET", f"/api/images/{task_id}") for _ in range(options.runs)],
            ),
        }
    with RedisServer() as server, Service(server.url, SANDBOX_DELAY="3600", WORKER_CONCURRENCY="1") as service:
        found["distinct submits"] = (
            "POST",
            [
                load(service.port, seconds, "POST", "/api/images/generate", bodies(200_000, str(run)))
                for run in range(options.runs)
            ],
        )
    table = Table(
        f"HTTP, {CONNECTIONS} connections, limits off, LOG_LEVEL=WARNING, {seconds} s a run",
        "what",
        "a second min / median / max",
        "x bare aiohttp",
    )
    for kind, rates in beside.items():
        table.add(f"bare aiohttp + orjson, {kind}", spread(rates), "1.00")
    for what, (kind, rates) in found.items():
        table.add(what, spread(rates), f"{sorted(rates)[len(rates) // 2] / sorted(beside[kind])[len(rates) // 2]:.2f}")
    table.show(command("http", options))
    end_to_end(options)


def end_to_end(options: Options) -> None:
    count = options.count(100, 3_000)
    table = Table(
        f"HTTP end to end, {count:,} tasks, upstream on loopback that answers at once, IMAGE_STORE=upstream",
        "concurrency",
        "tasks/s",
        "CPU ms a task",
    )
    for concurrency in (5, 50):
        with RedisServer() as server, emulator() as upstream:
            settings = {"TOGETHER_API_KEY": "k", "TOGETHER_API_URL": url_of(upstream), "IMAGE_STORE": "upstream"}
            with Service(server.url, WORKER_CONCURRENCY=str(concurrency), **settings) as service:
                submit(service.port, "warm up")
                used, began = service.cpu_s, time.perf_counter()
                load(service.port, 60.0, "POST", "/api/images/generate", bodies(count, "end"))
                while finished(service.port) <= count:
                    time.sleep(0.01)
                took_s = time.perf_counter() - began
                table.add(concurrency, f"{count / took_s:,.0f}", f"{(service.cpu_s - used) * 1000 / count:.2f}")
    table.show(command("http", options))


def finished(port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/stats") as answer:
        return int(json.load(answer)["tasks"]["completed"])
