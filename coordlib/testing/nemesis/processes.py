"""One application process, from outside: started, asked, killed, paused; and how it ended."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import coordlib

__all__ = ["ApplicationError", "Process"]

PROGRAM: Final = "coordlib.testing.nemesis.application"
LINE_SIZE_BYTES_MAX: Final = 1 << 26


class ApplicationError(Exception):
    """An application did not answer, has ended, or answered with an error; the message says which."""


class Process:
    """
    One incarnation of an application. Killed, at the latest, when the process that started it dies.

    Args:
        prefix: A command that becomes the program (`nsenter`, ...), keeping its process id.
        environment: Added to this process's own.
    """

    def __init__(self, name: str, log_path: Path) -> None:
        self.name = name
        self.log_path = log_path
        self.log_begin = log_path.stat().st_size if log_path.exists() else 0
        self.is_expected_to_end = False
        self._process: asyncio.subprocess.Process
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._ids = itertools.count(1)
        self._reader: asyncio.Task[None]

    @classmethod
    async def spawn(
        cls,
        name: str,
        given: dict[str, Any],
        *,
        log_path: Path,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] = {},
    ) -> Process:
        """Start it, and tell it what it is. Only from the main thread: its death ends the application."""
        self = cls(name, log_path)
        # The package that runs here is the one that must run there, whatever the working directory is.
        root = Path(coordlib.__file__).resolve().parent.parent
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("COORDLIB_")}
        paths = [str(root), str(root / "transports"), *filter(None, [inherited.get("PYTHONPATH")])]
        # By `env`, so that what runs in front of the program is not changed by it.
        changed = [f"{k}={v}" for k, v in {"PYTHONPATH": os.pathsep.join(paths), **environment}.items()]
        command = [*prefix, "/usr/bin/env", *changed, sys.executable, "-m", PROGRAM]
        with open(log_path, "ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=inherited,
                limit=LINE_SIZE_BYTES_MAX,
                # A session of its own: Ctrl-C is for the nemesis alone, which then ends the applications.
                start_new_session=True,
            )
        self._reader = asyncio.create_task(self._read())
        self._tell(given)
        return self

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        return self._process.returncode is not None

    @property
    def exit_code(self) -> int | None:
        """Negative: the signal that killed it."""
        return self._process.returncode

    @property
    def is_stopped(self) -> bool:
        """Whether the system says that it is stopped by a signal."""
        try:
            text = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return False
        return text.rpartition(")")[2].split()[0] == "T"

    def log_since_start(self) -> str:
        """What this incarnation wrote to its log."""
        with open(self.log_path, "rb") as log:
            log.seek(self.log_begin)
            return log.read().decode("utf-8", "replace")

    def _tell(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has ended; whoever waits for an answer is told

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            answer = json.loads(line)
            waiting = self._answers.pop(answer["id"], None)
            if waiting is not None and not waiting.done():
                waiting.set_result(answer)
        await self._process.wait()
        for waiting in self._answers.values():
            if not waiting.done():
                waiting.set_exception(
                    ApplicationError(f"{self.name} (process {self.pid}) has ended with {self.exit_code}")
                )
        self._answers.clear()

    async def do(self, do: str, *, timeout_seconds: float = 20.0, **arguments: Any) -> dict[str, Any]:
        """
        Tell it to do something and wait for the outcome.

        Raises:
            ApplicationError: It has ended, did not answer in time, or could not do it.
        """
        if self.has_ended:
            raise ApplicationError(f"{self.name} (process {self.pid}) has ended with {self.exit_code}")
        number = next(self._ids)
        waiting = asyncio.get_running_loop().create_future()
        self._answers[number] = waiting
        self._tell({"id": number, "do": do, **arguments})
        try:
            answer: dict[str, Any] = await asyncio.wait_for(waiting, timeout_seconds)
        except TimeoutError:
            raise ApplicationError(
                f"{self.name} (process {self.pid}) did not answer to {do!r} within {timeout_seconds:g} s"
            ) from None
        finally:
            self._answers.pop(number, None)
        if "error" in answer:
            raise ApplicationError(f"{self.name}: {answer['error']}")
        result: dict[str, Any] = answer["answer"]
        return result

    def signal(self, number: signal.Signals) -> None:
        try:
            self._process.send_signal(number)
        except ProcessLookupError:
            pass  # it has ended; whoever waits for that sees it

    async def kill(self) -> int:
        """kill -9; returns the exit code when it is gone."""
        self.is_expected_to_end = True
        self.signal(signal.SIGKILL)
        return await self.gone()

    async def leave(self, timeout_seconds: float) -> int | None:
        """Let it end in good order; the exit code, or None if it did not in time and was killed."""
        self.is_expected_to_end = True
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            return await self.gone(timeout_seconds)
        except TimeoutError:
            await self.kill()
            return None

    async def gone(self, timeout_seconds: float | None = None) -> int:
        """
        Wait for its end; returns the exit code.

        Raises:
            TimeoutError: It did not end in time.
        """
        await asyncio.wait_for(asyncio.shield(self._reader), timeout_seconds)
        assert self._process.returncode is not None
        return self._process.returncode
