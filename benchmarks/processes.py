"""Starts, tells, kills and restarts the application processes that the measurements are made in."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic, sleep
from types import TracebackType
from typing import Any, Self

from benchmarks.links import Links
from coordlib.wire.keys import generate_secret

__all__ = ["Application", "Fleet", "free_ports"]

ROOT = Path(__file__).resolve().parent.parent


def free_ports(count: int) -> list[int]:
    """Ports that nobody listened on just now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


class Application:
    """
    One process of a program that reads requests and writes answers, and the pipe to it.

    Args:
        program: What it runs, `python -m` this.
        environment: Added to this process's own.
    """

    def __init__(
        self,
        name: str,
        given: dict[str, Any],
        log_path: str,
        *,
        program: str = "benchmarks.application",
        environment: Mapping[str, str] = {},
    ) -> None:
        self.name = name
        self.log_path = log_path
        with open(log_path, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", program],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._tell(given)

    @property
    def pid(self) -> int:
        return self._process.pid

    def _tell(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def begin(self, do: str, **arguments: Any) -> None:
        """Tell it to do something; `answer()` waits for the outcome."""
        self._tell({"do": do, **arguments})

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            with open(self.log_path, encoding="utf-8", errors="replace") as log:
                raise RuntimeError(f"{self.name} has ended: {log.read()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        if set(answer) == {"error"}:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer

    def do(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Tell it to do something and wait for the outcome."""
        self.begin(do, **arguments)
        return self.answer()

    def kill(self) -> int:
        """kill -9, and wait until it is gone; returns the exit code."""
        self._process.kill()
        return self._finish()

    def end(self) -> int:
        """Close its input: it closes its handle and ends. Killed if it does not. Returns the exit code."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(10)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
        return self._finish()

    def _finish(self) -> int:
        code = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    # It died with something of ours unread.
                    pass
        return code


class Fleet:
    """
    Members on loopback, each an application process with its own directory; clients on request.

    Leaving the `with` block ends every process and removes every file.

    Args:
        environment: What is added to the environment of the process of this name.
        program: What members run; see `Application`.
        links: What they reach each other through; it knows the members by "n1", "n2" and so on.
    """

    def __init__(
        self,
        directory: str,
        *,
        members: int = 3,
        face: str = "threads",
        environment: Callable[[str], Mapping[str, str]] = lambda _: {},
        program: str = "benchmarks.application",
        links: Links | None = None,
        **settings: Any,
    ) -> None:
        self._directory = tempfile.mkdtemp(prefix="coordlib-bench-", dir=directory)
        self._face = face
        self._environment = environment
        self._settings = settings
        self.secret = generate_secret(os.urandom)
        self._program = program
        self._links = links
        names = [f"n{number + 1}" for number in range(members)]
        if links is None:
            ports = free_ports(members)
            self.endpoints = {
                name: f"tcp://127.0.0.1:{port}" for name, port in zip(names, ports, strict=True)
            }
        else:
            self.endpoints = {name: links.endpoints(name)[name] for name in names}  # where they listen
        self.members: dict[str, Application] = {}
        self._clients: list[Application] = []

    def __enter__(self) -> Self:
        try:
            self.launch()
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def launch(self) -> None:
        """Start the processes; their members are not started yet."""
        for name in self.endpoints:
            self.members[name] = self._member(name)

    def start(self) -> None:
        """Start the members in all of them at once."""
        for member in self.members.values():
            member.begin("start")
        for member in self.members.values():
            member.answer()

    def _member(self, name: str) -> Application:
        arguments = {
            "node": name,
            "members": self.endpoints if self._links is None else self._links.endpoints(name),
            "secret": self.secret,
            "data_dir": os.path.join(self._directory, name),
            **self._settings,
        }
        given = {"kind": "member", "face": self._face, "positional": ["bench"], "arguments": arguments}
        return Application(
            name, given, self._log_path(name), program=self._program, environment=self._environment(name)
        )

    def _log_path(self, name: str) -> str:
        return os.path.join(self._directory, f"{name}.log")

    def restart(self, name: str, *, is_waited_for: bool = True) -> None:
        """Start a member again on its own disk, after it was killed or has closed; else its `answer()` is to come."""
        self.members[name] = self._member(name)
        self.members[name].begin("start")
        if is_waited_for:
            self.members[name].answer()

    def client(self, face: str = "threads") -> Application:
        """A process with a started client."""
        name = f"client-{len(self._clients)}"
        given = {
            "kind": "client",
            "face": face,
            "positional": [list(self.endpoints.values())],
            "arguments": {"cluster": "bench", "secret": self.secret},
        }
        client = Application(name, given, self._log_path(name))
        self._clients.append(client)
        client.do("start")
        return client

    def leader(self, timeout_seconds: float = 10.0) -> Application:
        """The member that leads, by the word of all that run."""
        deadline = monotonic() + timeout_seconds
        while True:
            named = {member.do("stats").get("leader", "") for member in self.members.values()}
            if len(named) == 1 and (name := named.pop()) in self.members:
                return self.members[name]
            if monotonic() > deadline:
                raise RuntimeError("the members do not agree on a leader")
            sleep(0.02)

    def followers(self, leader: Application) -> Sequence[Application]:
        return [member for member in self.members.values() if member is not leader]

    def logs(self) -> dict[str, str]:
        """What every process wrote to its standard error."""
        out = {}
        for path in sorted(Path(self._directory).glob("*.log")):
            out[path.stem] = path.read_text(encoding="utf-8", errors="replace")
        return out

    def close(self) -> None:
        for application in (*self._clients, *self.members.values()):
            application.end()
        shutil.rmtree(self._directory, ignore_errors=True)
