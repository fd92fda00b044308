"""Images: CPU of a task with a real one, reads compared with a bare handler, memory with many large ones in flight."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from bench.http import GENERATE, Compared, Requests, bodies, compare, end
from bench.report import Options, Table, command, spread
from bench.servers import Child, RedisServer, Service, answers, asked, free_port, submit, until, url_of

MIB = 2**20
SMALL_BYTES, LARGE_BYTES, HUGE_BYTES = 92_000, 2_100_000, 8_000_000
IN_FLIGHT = 10


@contextmanager
def image_host(size_bytes: int, form: str, together: int = 1) -> Iterator[dict[str, str]]:
    """Run an upstream of images; yields the settings of a service that calls it and saves on the disk."""
    arguments = [sys.executable, "-m", "bench.imagehost", str(size_bytes), form, str(together)]
    with Child(arguments) as child:
        yield {"TOGETHER_API_KEY": "k", "TOGETHER_API_URL": url_of(child), "IMAGE_STORE": "disk"} | _format(form)


def _format(form: str) -> dict[str, str]:
    return {"TOGETHER_RESPONSE_FORMAT": "base64"} if form == "base64" else {}


def size_of(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1_000_000 else f"{count / 1e3:.0f} kB"


def cpu(options: Options) -> None:
    """Measure the service's processor time for one task, from the submit to its end.

    The part in system calls depends on the file system. On ext4 without a journal each new file passes over all that
    were deleted in the last five minutes: 0.3 ms more for a task after a run of the tests.
    """
    table = Table(
        "CPU of a task with a real image, IMAGE_STORE=disk, 5 at once",
        "image, how it comes",
        "goal ms",
        "CPU ms a task min / median / max",
        "of it in system calls",
        "tasks/s",
    )
    rows = (
        (SMALL_BYTES, "link", "1.1", options.count(20, 1_000)),
        (LARGE_BYTES, "link", "6", options.count(5, 150)),
        (SMALL_BYTES, "base64", "", options.count(20, 1_000)),
        (LARGE_BYTES, "base64", "9", options.count(5, 150)),
    )
    for size_bytes, form, goal, count in rows[::3] if options.tiny else rows:
        with (
            RedisServer() as server,
            image_host(size_bytes, form) as calling,
            Service(server.url, WORKER_CONCURRENCY="5", **calling) as service,
            Child([sys.executable, "-c", "input()"]) as nothing,
        ):
            submit(service.port, "warm up", "?wait=30")
            ends = [
                end(server, service, nothing, Requests("POST", GENERATE, bodies(count, f"{form} {run}")))
                for run in range(options.runs)
            ]
        table.add(
            f"{size_of(size_bytes)}, {form}",
            goal,
            spread([one.cpu_ms for one in ends], ".2f"),
            f"{statistics.median(one.system_ms for one in ends):.2f}",
            f"{statistics.median(one.per_s for one in ends):,.0f}",
        )
    table.show(command("images", options))


def reads(options: Options) -> None:
    """Compare image reads a second with a bare handler that sends the same bytes from memory."""
    seconds = 0.2 if options.tiny else float(options.count(1, 2, 5))
    table = Table(
        f"Image reads, limits off, {seconds:g} s a run, bare aiohttp and ours in turn",
        "image",
        "goal x bare",
        "x bare",
        "a second min / median / max",
        "bare a second",
        "CPU ms a request",
    )
    for size_bytes, goal in options.some((SMALL_BYTES, 0.8), (LARGE_BYTES, 1.0)):
        port = free_port()
        with (
            RedisServer() as server,
            image_host(size_bytes, "link") as calling,
            Service(server.url, **calling) as service,
            Child([sys.executable, "-m", "bench.bare", str(port), str(size_bytes)]),
        ):
            until(partial(answers, port, "/"), 10.0)
            task_id = submit(service.port, "an image to read", "?wait=30")
            url = asked(service.port, "GET", f"/api/images/{task_id}")["data"][0]["url"]
            path = "/" + url.split("/", 3)[3]
            image, bare_image = Requests("GET", path), Requests("GET", "/image")
            row = Compared(size_of(size_bytes), goal, service, partial(_same, image), bare_image)
            table.add(*compare(row, port, seconds, options.runs))
    table.show(command("images", options), "x bare: the median of the rounds' ratios.")


def memory(options: Options) -> None:
    """Highest memory of the service while large images are in flight, answered all at the same moment."""
    size_bytes = LARGE_BYTES if options.tiny else HUGE_BYTES
    count = options.count(2, IN_FLIGHT)
    table = Table(
        f"Memory with {count} images of {size_of(size_bytes)} in flight, IMAGE_STORE=disk",
        "how they come",
        "goal MiB",
        "MiB before",
        "most MiB",
    )
    for form in options.some("link", "base64"):
        with (
            RedisServer() as server,
            image_host(size_bytes, form, count) as calling,
            Service(server.url, WORKER_CONCURRENCY=str(count), **calling) as service,
        ):
            before = service.rss_bytes / MIB
            ids = [submit(service.port, f"huge {number}") for number in range(count)]
            until(partial(_all_completed, service, ids), 60.0, 0.05)
            table.add(form, "120", f"{before:.0f}", f"{peak_bytes(service.process.pid) / MIB:.0f}")
    table.show(command("images", options), "most: the kernel's VmHWM.")


def _same(requests: Requests, _mark: str) -> Requests:
    return requests


def _all_completed(service: Service, task_ids: Iterable[str]) -> bool:
    return all(_completed(service, task_id) for task_id in task_ids)


def _completed(service: Service, task_id: str) -> bool:
    task = asked(service.port, "GET", f"/api/images/{task_id}")
    if task["status"] == "failed":
        raise RuntimeError(json.dumps(task))
    return bool(task["status"] == "completed")


def peak_bytes(pid: int) -> int:
    """Return the most memory that a process had so far; 0 where the system has no /proc."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def main(options: Options) -> None:
    cpu(options)
    reads(options)
    memory(options)
