"""The command `imagegen`: `serve` runs the service, `generate` makes images, `doctor` checks what the service needs,
`keys` manages API keys, `usage` prints the bill.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import Any, NoReturn

from imagegen import __version__

FAILED, USAGE, INTERRUPTED = 1, 2, 130
"""Exit codes."""

DAY_S = 86400


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code. arguments: None for those of the process."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        chosen = _parsed(given) if given else None
        is_service = chosen is None or chosen.command in (None, "serve")
        if is_service:
            for number in (signal.SIGTERM, signal.SIGINT):  # the kernel ignores them in a container's first process
                signal.signal(number, _exit_before_start)
        if (fault := _environment_fault()) is not None:
            print(fault, file=sys.stderr)
            return USAGE
        return _run(chosen) if chosen and not is_service else _serve()
    except KeyboardInterrupt:
        return INTERRUPTED


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments; help and version end the process here."""
    parser = _parser()
    parser.given = arguments
    return parser.parse_args(arguments)


def _run(chosen: argparse.Namespace) -> int:
    if chosen.command == "doctor":
        return _doctor(chosen)
    if chosen.command == "generate":
        return _generate(chosen)
    if chosen.command == "mcp":
        from imagegen import mcp_command  # noqa: PLC0415 - as below

        return mcp_command.run(chosen)
    if chosen.command == "keys":
        from imagegen import key_command  # noqa: PLC0415 - as below

        return key_command.run(chosen)
    from imagegen import usage_command  # noqa: PLC0415 - as below

    return usage_command.run(chosen)


def _serve() -> int:
    gc.disable()  # there is next to no garbage: searching for it is a tenth of the time of a start
    from imagegen.process import main as serve  # noqa: PLC0415 - help and version need no service

    gc.freeze()
    gc.enable()
    return serve()


def _environment_fault() -> str | None:
    """Return why the libraries can't work with the variables that they read themselves."""
    if abs(time.localtime().tm_gmtoff) >= DAY_S:
        return "TZ: its offset is a day or more, which Python can't use; set a time zone such as UTC"
    try:
        import loguru  # noqa: F401, PLC0415 - it reads variables of its own when it is imported
    except ValueError as error:
        return f"LOGURU_: {error}; take the variable away, since LOG_LEVEL and LOG_FORMAT set the log"
    return None


def _exit_before_start(_number: int, _frame: object) -> NoReturn:
    """End the process while it has nothing to release; a module that is being imported could catch an exception."""
    os._exit(0)


def _generate(chosen: argparse.Namespace) -> int:
    try:
        from imagegen import generate_command  # noqa: PLC0415 - as above
    except ModuleNotFoundError as error:
        if error.name != "httpx":
            raise
        print(f"imagegen generate needs httpx: {sys.executable} -m pip install httpx", file=sys.stderr)
        return FAILED
    return generate_command.run(chosen)


def _doctor(chosen: argparse.Namespace) -> int:
    try:
        return doctor(datetime.now(UTC).date(), models_only=chosen.models)
    except OSError as error:
        if error.filename != "stdout":
            raise
        print(f"stdout can't be written ({error.strerror})", file=sys.stderr)
        return FAILED


def doctor(today: date, *, models_only: bool) -> int:
    """Print the findings; return 1 if one is fatal, or with `models_only` if there is any."""
    from imagegen import doctor as checks  # noqa: PLC0415 - as above
    from imagegen import log  # noqa: PLC0415
    from imagegen.channel_parts import load_tables  # noqa: PLC0415
    from imagegen.errors import SettingsError  # noqa: PLC0415
    from imagegen.settings import Settings  # noqa: PLC0415
    from imagegen.standard_streams import print_result  # noqa: PLC0415

    log.configure("ERROR", "text")
    try:
        settings = Settings.load()
        if models_only:
            table, _ = load_tables(settings)
            findings = [checks.Finding(each.text, fatal=True) for each in checks.check_table(table, today)]
        else:
            findings = list(checks.check_all(settings, today, lambda line: print_result(f"ok: {line}")))
            if server := checks.embedded_server(settings):
                print_result(f"embedded Redis: {server}")
    except SettingsError as error:
        findings = [checks.Finding(line, fatal=True) for line in str(error).splitlines()]
    for finding in findings:
        print_result(f"{'FAULT' if finding.fatal else 'warning'}: {finding.text}")
    fatal = sum(finding.fatal for finding in findings)
    counts = f"{_counted(fatal, 'fault')}, {_counted(len(findings) - fatal, 'warning')}"
    print_result(counts if findings else "all checks passed")
    return FAILED if fatal else 0


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


class _Parser(argparse.ArgumentParser):
    """Parser with whole options only; an unknown option with the name of a setting is explained."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})
        self.given: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        from imagegen.settings import setting_names  # noqa: PLC0415 - help and version need no settings

        for argument in self.given:
            option = argument.partition("=")[0]
            name = option.removeprefix("--").upper().replace("-", "_")
            if option.startswith("--") and name in setting_names():
                message = f"{option} is no option: set {name} in the environment or in .env"
                break
        else:
            if "invalid choice" in message and self.given and self.given[0].startswith("-"):
                message = f"unrecognized arguments: {self.given[0]}"  # and not its value as an unknown command
        super().error(message)


def _parser() -> _Parser:
    parser = _Parser(
        prog="imagegen",
        description="Paid image APIs as a durable asynchronous API. Without a command, it runs the service.",
        epilog="Every setting is read from the environment or from .env; .env.example lists them.",
    )
    parser.add_argument("--version", action="version", version=f"imagegen {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands")
    commands.add_parser("serve", help="run the service (the default)")
    _add_generate(commands)
    checks = commands.add_parser("doctor", help="check settings, folders, models and Redis; exit code 1 for a fault")
    checks.add_argument("--models", action="store_true", help="check only the model table, and any finding is a fault")
    agents = commands.add_parser("mcp", help="serve the tools of agents on stdin and stdout")
    agents.add_argument("--url", metavar="BASE", help="address of a running service; absent: one in this process")
    agents.add_argument("--key", metavar="KEY", help="API key of that service")
    _add_keys(commands)
    _add_usage(commands)
    return parser


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser(
        "generate",
        help="make images of a prompt and print the paths of their files",
        description="Makes images of a prompt by the service at --url, else in this process with its settings. Only "
        "the paths of the files are printed on stdout. The same command again is the same task, and pays nothing.",
    )
    generate.add_argument("prompt", metavar="PROMPT", nargs="?")
    generate.add_argument("-n", type=int, metavar="N", help="number of images")
    generate.add_argument("--model", metavar="M", help="model, DEFAULT_MODEL if absent")
    generate.add_argument("--size", type=_size, metavar="WxH", help="size in pixels, as 1024x768")
    generate.add_argument(
        "--image", nargs="+", action="extend", metavar="FILE", help="input images: files or https addresses"
    )
    generate.add_argument("--seed", type=int, metavar="N", help="for the same images again")
    generate.add_argument("--out", default=".", metavar="DIR", help="folder of the images, this one if absent")
    generate.add_argument("--url", metavar="BASE", help="address of a running service")
    generate.add_argument("--key", metavar="KEY", help="API key of that service")
    generate.add_argument("--json", action="store_true", help="print one JSON object instead of the paths")


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,5})[xX×*]([0-9]{1,5})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size in pixels: give it as 1024x768")
    return int(match[1]), int(match[2])


def _add_keys(commands: Any) -> None:
    keys = commands.add_parser("keys", help="make, list, revoke or rotate API keys")
    actions = keys.add_subparsers(dest="action", title="actions", required=True)
    create = actions.add_parser("create", help="make a key; its secret is printed this once")
    create.add_argument("name", metavar="NAME")
    create.add_argument("--daily-usd", type=float, metavar="D", help="budget of a UTC day in US dollars")
    create.add_argument("--rate", type=int, metavar="N", help="requests a minute")
    create.add_argument("--images-rate", type=int, metavar="N", help="generations a minute")
    create.add_argument("--open-tasks", type=int, metavar="N", help="unfinished tasks at once")
    create.add_argument("--models", metavar="PATTERNS", help="models that it may use, as 'flux*,gpt-image-1'")
    create.add_argument("--max-megapixels", type=float, metavar="M", help="of one image; 1024x1024 is one")
    create.add_argument("--expires", metavar="TIME", help="its life, as 90d, 12h or seconds")
    actions.add_parser("list", help="list all keys; secrets are not stored")
    revoke = actions.add_parser("revoke", help="refuse a key from now on")
    revoke.add_argument("name", metavar="NAME")
    rotate = actions.add_parser("rotate", help="give a key a second secret, which is printed this once")
    rotate.add_argument("name", metavar="NAME")
    rotate.add_argument("--grace", metavar="TIME", help="how long the old secret lives, as 24h (the default) or 0")


def _add_usage(commands: Any) -> None:
    usage = commands.add_parser(
        "usage",
        help="print what was asked for, made, spent and saved",
        description="Prints the usage of all clients. A running service writes its last minute later.",
    )
    usage.add_argument("--from", metavar="DATE", dest="first", help="first day in UTC, 29 days before --to if absent")
    usage.add_argument("--to", metavar="DATE", dest="last", help="last day in UTC, today if absent")
    usage.add_argument("--by", metavar="WHAT", help="what a row is: day, key or model")
    form = usage.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as GET /api/usage")
    form.add_argument("--csv", action="store_true", help="rows with a header line")
