"""The command `imagegen usage`: the usage report of all clients, from the Redis of the settings."""

from __future__ import annotations

import argparse
import json
import time

from imagegen.accounts.usage_report import COLUMNS, UsageQuery, UsageReport
from imagegen.accounts.usage_store import UsageStore
from imagegen.command_redis import connected_redis, run_command
from imagegen.formats import printable
from imagegen.redis_client.keys import Keys
from imagegen.settings import Settings
from imagegen.standard_streams import print_result

NO_KEY = "(no key)"


def run(chosen: argparse.Namespace) -> int:
    """Run the command; return its exit code."""

    async def command(settings: Settings) -> int:
        options = {"from": chosen.first, "to": chosen.last, "by": chosen.by}
        query = UsageQuery.parse({name: text for name, text in options.items() if text is not None}, time.time())
        async with connected_redis(settings) as connection:
            store = UsageStore(connection, Keys(settings.redis_prefix))
            parts = ((day, part.rows) for day in query.days async for part in store.read(day))
            report = await UsageReport.of(parts, query)
        if chosen.json:
            print_result(json.dumps(report.to_view(), ensure_ascii=False, indent=2))
        else:
            print_result((report.to_csv() if chosen.csv else _table(report)).removesuffix("\n"))
        return 0

    return run_command(command)


def _table(report: UsageReport) -> str:
    """Return the rows and their total in columns; money in US dollars."""
    view, by = report.to_view(), report.query.by
    lines = [[by, *COLUMNS]]
    lines += [[_cell(row[by] or NO_KEY), *(_cell(row[name]) for name in COLUMNS)] for row in view["rows"]]
    lines.append(["total", *(_cell(view["total"][name]) for name in COLUMNS)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ""
    for label, *cells in lines:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        text += "  ".join([label.ljust(widths[0]), *padded]) + "\n"
    return text


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6f}"
    return printable(str(value))
