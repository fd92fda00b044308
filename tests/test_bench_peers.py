"""Tests of the peer benchmark: an unmeasurable peer is reported and does not stop the others. No network is used."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from loguru import logger

from bench import __main__ as bench
from bench.peers import installed, run
from bench.peers.installed import NotMeasured
from bench.peers.run import OURS, Run, rounds, table
from bench.report import Options


def make_run(rate: float, commands: float = 2.0) -> Run:
    return Run(5_000, rate, commands, "1.2.3")


def shown(capsys: pytest.CaptureFixture[str], results: dict[str, list[Run] | str]) -> dict[str, list[str]]:
    """Return the cells of each row."""
    table("Title", results).show("a command")
    rows = (re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines())
    return {cells[0]: cells[1:] for cells in rows}


def test_the_ratio_is_of_the_runs_of_one_round(capsys: pytest.CaptureFixture[str]) -> None:
    rows = shown(
        capsys,
        {
            OURS: [make_run(8_000), make_run(6_000), make_run(9_000)],
            "arq": [make_run(2_000), make_run(3_000), make_run(1_000)],
        },
    )
    assert rows["arq"] == ["1.2.3", "5,000", "1,000 / 2,000 / 3,000", "2.00 / 4.00 / 9.00", "2.00"]
    assert rows[OURS] == ["1.2.3", "5,000", "6,000 / 8,000 / 9,000", "1", "2.00"]


def test_commands_are_the_median_of_the_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    rows = shown(capsys, {OURS: [make_run(1, 3.0), make_run(1, 9.0), make_run(1, 4.254)]})
    assert rows[OURS][-1] == "4.25"


def test_an_unmeasured_peer_shows_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    rows = shown(capsys, {OURS: [make_run(8_000)], "bullmq": "there is no node here", "saq": [make_run(2_000)]})
    assert rows["bullmq"][-1] == "not measured: there is no node here"
    assert rows["saq"][3] == "4.00 / 4.00 / 4.00"


def test_rounds_are_interleaved_and_skip_peers_that_failed() -> None:
    order: list[str] = []

    def ours() -> Run:
        order.append("ours")
        return make_run(1)

    def failing() -> Run:
        order.append("failing")
        raise NotMeasured("no registry")

    def other() -> Run:
        order.append("other")
        return make_run(2)

    results = rounds({OURS: ours, "failing": failing, "other": other}, 2)
    assert order == ["ours", "failing", "other", "ours", "other"]
    assert results == {OURS: [make_run(1), make_run(1)], "failing": "no registry", "other": [make_run(2), make_run(2)]}


def test_a_whole_run_shows_ours_and_each_peer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run fake peers: a script that prints its line, and a peer with a failing set-up."""
    line = json.dumps({"seconds": 0.5, "submitted": 4, "version": "9.9"})

    def command(name: str) -> list[str]:
        if name == "saq":
            raise NotMeasured("no registry")
        (tmp_path / name).mkdir(exist_ok=True)
        return [sys.executable, "-c", f"print({line!r})"]

    monkeypatch.setattr(installed, "command", command)
    monkeypatch.setattr(installed, "FOLDER", tmp_path)
    run.queue(Options(runs=1, tiny=True, peers=True))
    printed = capsys.readouterr().out
    assert re.search(r"imagegen +this tree +100 ", printed)
    assert re.search(r"arq +9\.9 +20 +40 / 40 / 40 ", printed)
    assert re.search(r"saq .*not measured: no registry\n", printed)
    assert "$ PEERS=1 python -m bench queue --tiny --runs 1\n" in printed


def test_peers_run_only_with_the_queue_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, bool]] = []
    monkeypatch.setattr(bench, "BENCHES", {name: lambda o: made.append(("alone", o.peers)) for name in bench.BENCHES})
    monkeypatch.setattr(run, "queue", lambda o: made.append(("beside", o.peers)))
    monkeypatch.setattr(logger, "remove", lambda: None)
    monkeypatch.setattr(sys, "argv", ["bench", "queue", "pace"])
    monkeypatch.setenv("PEERS", "1")
    bench.main()
    monkeypatch.setenv("PEERS", "")
    bench.main()
    assert made == [("beside", True), ("alone", False), ("alone", False), ("alone", False)]


@pytest.mark.parametrize("name", run.COUNTS)
def test_each_peer_has_a_script_and_exact_versions(name: str) -> None:
    assert installed.script(name).is_file()
    text = installed.pins(name).read_text()
    if installed.pins(name).suffix == ".json":
        versions = json.loads(text)["dependencies"]
        assert name in versions
        assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in versions.values())
    else:
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        assert lines[0].partition("==")[0].partition("[")[0] == name
        assert all(re.fullmatch(r"[\w-]+(\[\w+\])?==\d+(\.\d+)+", line) for line in lines)


def test_a_missing_failing_or_hanging_program_is_a_reason(tmp_path: Path) -> None:
    with pytest.raises(NotMeasured, match=r"^there is no no-such-program here$"):
        installed.output(["no-such-program"], tmp_path, 5.0)
    with pytest.raises(NotMeasured, match=r"^3 of 4 results are stored$"):
        installed.output([sys.executable, "-c", "import sys; sys.exit('3 of 4 results are stored')"], tmp_path, 5.0)
    with pytest.raises(NotMeasured, match=r"^not done in 0\.2 s$"):
        installed.output([sys.executable, "-c", "import time; time.sleep(30)"], tmp_path, 0.2)


def test_a_peer_is_installed_again_only_when_its_pins_change(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[str] = []
    pins = tmp_path / "arq.txt"
    monkeypatch.setattr(installed, "FOLDER", tmp_path / ".bench")
    monkeypatch.setattr(installed, "pins", lambda _: pins)
    monkeypatch.setattr(installed, "output", lambda arguments, *_: ran.append(arguments[2]))
    for text in ("arq==1.0.0", "arq==1.0.0", "arq==2.0.0"):
        pins.write_text(text)
        program, script = installed.command("arq")
        assert Path(program).is_relative_to(tmp_path / ".bench" / "arq")
        assert Path(script).name == "arq_peer.py"
    assert ran == ["venv", "pip", "venv", "pip"]


def test_a_failed_installation_is_retried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def failing(*_: object) -> str:
        raise NotMeasured("no registry")

    monkeypatch.setattr(installed, "FOLDER", tmp_path)
    monkeypatch.setattr(installed, "output", failing)
    for _ in range(2):
        with pytest.raises(NotMeasured, match="no registry"):
            installed.command("bullmq")
