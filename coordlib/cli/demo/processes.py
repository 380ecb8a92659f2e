"""The three applications as processes, and where their program is found."""

from __future__ import annotations

import importlib.metadata
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import coordlib
from coordlib.errors import StartError, UsageError

__all__ = ["Application", "free_endpoints", "program_path"]

PROGRAM: Final = "orders_service.py"


def program_path(name: str = PROGRAM) -> Path:
    """
    A program in the source tree's examples/, or the copy that was installed with the package.

    Raises:
        UsageError: It is in neither place.
    """
    root = Path(coordlib.__file__).resolve().parent.parent
    path = root / "examples" / name
    if (root / "pyproject.toml").exists() and path.exists():
        return path
    try:
        files = importlib.metadata.files("coordlib") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == name:
            return Path(str(file.locate())).resolve()
    raise UsageError(
        f"the demo's program {name} is not installed here: run the demo from the source tree (`make demo`)"
    )


def free_endpoints(names: list[str]) -> dict[str, str]:
    """An address on loopback for each name, free at this moment."""
    sockets = {name: socket.socket() for name in names}
    try:
        for one in sockets.values():
            one.bind(("127.0.0.1", 0))
        return {name: f"tcp://127.0.0.1:{one.getsockname()[1]}" for name, one in sockets.items()}
    finally:
        for one in sockets.values():
            one.close()


class Application:
    """
    One process of the order service, or of another program in examples/.

    It lives no longer than this one: it leaves in good order when its standard input ends, which it does
    when this process ends, however that happens.
    """

    def __init__(
        self,
        name: str,
        environment: dict[str, str],
        log_path: Path,
        *,
        program: str = PROGRAM,
        arguments: Sequence[str] = (),
    ) -> None:
        self.name = name
        self._log_path = log_path
        # The package that runs here is the one that must run there, whatever the working directory is.
        root = str(Path(coordlib.__file__).resolve().parent.parent)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("COORDLIB_", "ORDERS_"))}
        paths = [root, str(Path(root) / "transports"), *filter(None, [inherited.get("PYTHONPATH")])]
        with open(log_path, "ab") as log:
            # A session of its own: Ctrl-C is for the demo alone, which then ends the applications.
            self._process = subprocess.Popen(
                [sys.executable, str(program_path(program)), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**inherited, **environment, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def tell(self, command: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(command.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; `expect` says so

    def expect(self, word: str, timeout_seconds: float) -> None:
        """
        Wait for the application to say `word`.

        Raises:
            StartError: It said nothing in time or has ended; with the end of its log.
        """
        out = self._process.stdout
        assert out is not None
        deadline = time.monotonic() + timeout_seconds
        said = b""
        while not said.endswith(b"\n"):
            readable, _, _ = select.select([out], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(out.fileno(), 1) if readable else b""
            if not piece:
                state = "has ended" if readable else f"did not answer within {timeout_seconds:g} s"
                raise StartError(
                    f"{self.name} (process {self.pid}) {state}; waited for {word!r}:{self.log_end()}"
                )
            said += piece
        if said.strip() != word.encode():
            raise StartError(f"{self.name} said {said.decode()!r}; waited for {word!r}:{self.log_end()}")

    def log_end(self) -> str:
        """The last lines of its log, indented, for an error message."""
        try:
            lines = self._log_path.read_text("utf-8", "replace").splitlines()[-6:]
        except OSError:
            return ""
        return "".join(f"\n    {line}" for line in lines)

    def kill(self) -> None:
        """SIGKILL, and return when it is dead."""
        self._process.kill()
        self._process.wait()
        self._close_pipes()

    def close(self, timeout_seconds: float) -> bool:
        """Let it leave in good order; whether it did within the time. It is gone in any case."""
        process = self._process
        self._close_pipes(only_input=True)
        try:
            code = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        self._close_pipes()
        return code == 0

    def end_input(self) -> None:
        """Ask it to leave, without waiting."""
        self._close_pipes(only_input=True)

    def _close_pipes(self, *, only_input: bool = False) -> None:
        for pipe in (self._process.stdin, None if only_input else self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass  # what was buffered has no reader any more
