"""Throw-away database servers: what they say when they cannot be made, and that they leave nothing behind."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from coordlib.errors import CoordError, UsageError
from coordlib.testing import databases
from coordlib.testing.databases import DatabaseServer, MariaDBServer, PostgreSQLServer, ServerMissing


class Sleeper(DatabaseServer):
    """A server that only lives."""

    answers = True

    def _create(self) -> None:
        self._run(["true"])

    def _command(self) -> list[str]:
        return ["sleep", "1000"]

    def _is_ready(self) -> bool:
        return self.answers


class Interrupted(Sleeper):
    """Somebody presses Ctrl-C while it is waited for."""

    pid = 0

    def _is_ready(self) -> NoReturn:
        assert self._process is not None
        type(self).pid = self._process.pid
        raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of this test's own for servers, whoever runs them."""
    monkeypatch.setattr(databases, "_unprivileged", lambda names: None)
    monkeypatch.setattr(databases, "_parent_directory", lambda user: str(tmp_path))
    return tmp_path


def test_a_server_can_crash_and_come_back_and_leaves_nothing(place: Path) -> None:
    """Closed twice, too; and what is closed is not started again."""
    with Sleeper() as server:
        assert server.is_running
        assert server.directory.parent == place
        server.kill()
        assert not server.is_running
        server.restart()
        assert server.is_running
        with pytest.raises(UsageError, match="runs already"):
            server.start()
    server.close()
    assert not server.is_running
    assert list(place.iterdir()) == []
    with pytest.raises(UsageError, match="is closed"):
        server.start()


def test_a_start_that_is_interrupted_leaves_nothing(place: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Interrupted():
        pass
    assert Interrupted.pid
    assert not Path(f"/proc/{Interrupted.pid}").exists()
    assert list(place.iterdir()) == []


def test_a_creation_that_is_interrupted_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pids: list[int] = []

    class Slow(Sleeper):
        def _create(self) -> None:
            self._run(["sleep", "1000"])

    wait = subprocess.Popen.wait

    def interrupted(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if not pids:
            pids.append(process.pid)
            raise KeyboardInterrupt
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Slow()
    assert not Path(f"/proc/{pids[0]}").exists()
    assert list(place.iterdir()) == []


def test_a_start_runs_no_hooks_of_forks(place: Path) -> None:
    """An interrupt in one of them is lost, and leaves `logging` locked for ever; a demo that was interrupted found it."""
    forks: list[int] = []
    os.register_at_fork(before=lambda: forks.append(1))
    with Sleeper() as server:
        assert server.is_running
    assert forks == []


def test_a_creation_that_fails_says_why_and_leaves_nothing(place: Path) -> None:
    class Failing(Sleeper):
        def _create(self) -> None:
            self._run(["ls", "/nothing-is-here"])

    with pytest.raises(CoordError, match=r"ls failed \(2\):\n.*nothing-is-here"):
        Failing()
    assert list(place.iterdir()) == []


def test_a_server_that_ends_by_itself_says_how(place: Path) -> None:
    class Ending(Sleeper):
        answers = False

        def _command(self) -> list[str]:
            return ["sh", "-c", "echo no such luck; exit 3"]

    with pytest.raises(CoordError, match="Ending did not start:\nno such luck"), Ending():
        pass
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "package"), [(PostgreSQLServer, "postgresql"), (MariaDBServer, "mariadb-server")]
)
def test_a_missing_server_is_named_in_one_line(
    kind: type[DatabaseServer], package: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(databases, "_FOLDERS", ())
    monkeypatch.setattr(databases, "_DEBIAN", place)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ServerMissing, match=f"^[^\n]* not installed: apt-get install {package}$"):
        kind()
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(("kind", "extra"), [(PostgreSQLServer, "postgresql"), (MariaDBServer, "mariadb")])
def test_a_missing_driver_is_named_in_one_line(
    kind: type[DatabaseServer], extra: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ServerMissing, match=rf"^[^\n]* not installed: pip install 'coordlib\[{extra}\]'$"):
        kind()
    assert list(place.iterdir()) == []


def test_the_module_needs_neither_drivers_nor_pytest() -> None:
    """It says what is missing when a server is wanted, not before."""
    program = (
        "import sys\n"
        "for name in ('psycopg', 'pymysql', 'sqlalchemy', 'pytest'):\n"
        "    sys.modules[name] = None\n"
        "import coordlib.testing, coordlib.testing.databases"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_place_that_the_servers_user_cannot_reach_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one whose path leaves no room for a socket; if all are so, the error names the setting."""
    monkeypatch.undo()
    user: Any = object()
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    for name in (str(private), "/tmp/" + "x" * 60):
        monkeypatch.setattr("tempfile.gettempdir", lambda name=name: name)
        assert databases._parent_directory(user) in ("/tmp", "/var/tmp")
    monkeypatch.setattr(databases, "_PARENT_CHARACTERS_MAX", 0)
    with pytest.raises(CoordError, match="TMPDIR"):
        databases._parent_directory(user)
