"""`coordlib demo`, for real but short: it proves what was promised, and fails when that is broken on purpose."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SECONDS = "1.5"


def start(directory: Path, *arguments: str) -> subprocess.Popen[str]:
    paths = [str(ROOT), str(ROOT / "transports"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", "coordlib.cli", "demo", "--plain", "--seconds", SECONDS, *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(directory)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def play(directory: Path, *arguments: str) -> tuple[int, str]:
    process = start(directory, *arguments)
    try:
        out, err = process.communicate(timeout=100)
    finally:
        process.kill()
        process.communicate()
    assert "Traceback" not in err
    assert err == ""
    return process.returncode, out


def processes_of(out: str) -> list[int]:
    """The process ids of all applications that the demo told of."""
    return [
        int(line.split("process ")[1].split()[0].rstrip(","))
        for line in out.splitlines()
        if ": process " in line
    ]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_demo_proves_its_claims_and_leaves_nothing(tmp_path: Path) -> None:
    """
    Leader killed, writes go on, the member catches up; orders over two services are whole, whoever is killed when. Six
    proofs hold; no process and no file remains.
    """
    code, out = play(tmp_path)
    assert code == 0, out
    assert out.count("proved: ") == 6
    for words in (
        "kill -9",
        "the leader, is dead",
        "without an acknowledged write",
        "caught up with index",
        "nothing is decided",
        "have done what was decided",
    ):
        assert words in out
    pids = processes_of(out)
    assert len(pids) == 4 + 3 + 1 + 2 + 1 + 1
    assert not any(map(is_alive, pids))
    assert list(tmp_path.iterdir()) == []


def test_a_lock_entered_without_being_held_fails_the_proof(tmp_path: Path) -> None:
    code, out = play(tmp_path, "--sabotage=lock")
    assert code == 1, out
    assert "FAILED: no lock had two holders at once" in out
    assert "entered with token" in out
    assert list(tmp_path.iterdir()) == []


def test_a_write_acknowledged_but_not_made_fails_the_proof(tmp_path: Path) -> None:
    """Only that proof fails, and it names the writes."""
    code, out = play(tmp_path, "--sabotage=ack")
    assert code == 1, out
    assert "FAILED: every acknowledged write is on all three members" in out
    assert "was acknowledged, but is None on orders-" in out
    assert out.count("proved: ") == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_demo_leaves_no_process(tmp_path: Path, number: int) -> None:
    """
    Ctrl-C and SIGTERM end it within seconds and leave no file either.

    Even killed, it takes its applications with it: their standard input ends.
    """
    process = start(tmp_path)
    assert process.stdout is not None
    lines: list[str] = []
    while "are open after" not in "".join(lines):
        lines.append(process.stdout.readline())
        assert lines[-1], process.communicate()
    pids = processes_of("".join(lines))
    assert len(pids) == 3
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    if number != signal.SIGKILL:
        assert process.returncode == 130, err
        assert "interrupted" in err
        assert list(tmp_path.iterdir()) == []
        assert not any(map(is_alive, pids))
        return
    for pid in pids:
        _await_end(pid)


def _await_end(pid: int) -> None:
    """Returns when the process, which is not a child of this one, has ended; pytest's timeout guards it."""
    try:
        file = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        ended, _, _ = select.select([file], [], [], 30)
        assert ended, f"process {pid} outlived the demo"
    finally:
        os.close(file)


def test_a_demo_that_is_interrupted_leaves_no_database(tmp_path: Path) -> None:
    """One server runs, the other one is being made."""
    process = start(tmp_path, "--db", "postgres")
    assert process.stdout is not None
    line = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    if "is not installed" in err and os.environ.get("COORDLIB_REQUIRE_DATABASES") != "1":
        pytest.skip(err)
    assert "the PostgreSQL of inventory: process " in line, err
    assert (process.returncode, "interrupted" in err) == (130, True), err
    assert not any(map(is_alive, processes_of(line)))
    assert not Path(line.split()[-1]).exists()
    assert list(tmp_path.iterdir()) == []
