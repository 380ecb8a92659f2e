"""isolation="process": the member in a process of its own, the application attached to it as a client.

For applications with CPU-bound threads: there, every round of a node on a thread would wait for the
interpreter several times. The child lives exactly as long as the application: it reads a pipe whose other
end only the application holds, and leaves in good order when that end closes, for whatever reason.

Protocol on the child's standard input: one line of JSON with the settings, then nothing until the end of
the file. On its standard output: one line of JSON, {"ok": true} or {"error": code, "message": text}.
"""

from __future__ import annotations

import json
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict
from typing import Any, Final

from coordlib.config import ClientSettings, MemberSettings, Timing
from coordlib.errors import CoordError, StartError
from coordlib.node.driver import ClientDriver, MemberDriver
from coordlib.storage.files import PosixFileSystem
from coordlib.storage.segments import SegmentStorage

__all__ = ["ProcessDriver", "main"]

log = logging.getLogger("coordlib")
GRACE_SECONDS: Final = 5.0
STOP_SECONDS: Final = 5.0


class ProcessDriver(ClientDriver):
    """Starts the member's process, then attaches to it over a socket in a private directory."""

    def __init__(self, settings: MemberSettings) -> None:
        self._member = settings
        self._directory = ""
        self._child: subprocess.Popen[bytes] | None = None
        # The address is filled in at the start: constructing touches no file.
        super().__init__(_client_settings(settings, "ipc://unset"))

    def start(self) -> None:
        """See Driver.start; errors of the member's process are raised here as its own."""
        self._directory = tempfile.mkdtemp(prefix="coordlib-")
        endpoint = f"ipc://{self._directory}/node"
        self._settings = _client_settings(self._member, endpoint)
        try:
            self._spawn(endpoint)
            super().start()
        except BaseException:
            self._end_child(0.0)
            raise

    def _spawn(self, endpoint: str) -> None:
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path))
        child = subprocess.Popen(
            [sys.executable, "-c", "from coordlib.node.process import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._child = child
        assert child.stdin is not None and child.stdout is not None
        member = asdict(self._member)
        try:
            child.stdin.write(json.dumps({"member": member, "endpoint": endpoint}).encode() + b"\n")
            child.stdin.flush()
        except BrokenPipeError:
            pass  # it died; what it says is read below
        timeout = self._member.timing.start_timeout_ms / 1000 + GRACE_SECONDS
        is_readable, _, _ = select.select([child.stdout], [], [], timeout)
        line = child.stdout.readline() if is_readable else b""
        if not line:
            raise StartError(
                "the member's process ended without a word: see its messages on standard error"
                if is_readable
                else f"the member's process did not start within {timeout:g} s"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise _rebuild_error(answer)
        threading.Thread(target=self._watch, args=(child,), name="coordlib-watch", daemon=True).start()

    def _watch(self, child: subprocess.Popen[bytes]) -> None:
        code = child.wait()
        if not self._is_stopping:
            log.critical(
                "%s: the member's process has ended (%s). This application goes on as a client of the other members; "
                "restart it to run its member again",
                self._member.node,
                code,
                extra={"event": "node.process-died", "exit_code": code},
            )

    def stop(self, timeout_seconds: float) -> None:
        if self.pid != os.getpid():
            return
        super().stop(timeout_seconds)
        self._end_child(timeout_seconds)

    def _end_child(self, timeout_seconds: float) -> None:
        child, self._child = self._child, None
        if child is not None:
            assert child.stdin is not None and child.stdout is not None
            try:
                child.stdin.close()
            except BrokenPipeError:
                pass
            try:
                child.wait(timeout_seconds + 1.0)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            child.stdout.close()
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = ""

    def after_fork_in_child(self) -> None:
        super().after_fork_in_child()
        child = self._child
        if child is not None and child.stdin is not None and child.stdout is not None:
            # The member's process ends when nobody holds this pipe: a forked worker must not.
            null = os.open(os.devnull, os.O_RDWR)
            for pipe in (child.stdin, child.stdout):
                os.dup2(null, pipe.fileno(), inheritable=False)
            os.close(null)

    def stats(self, timeout_seconds: float = 5.0) -> dict[str, Any]:
        """The member's own status, and this side's."""
        statuses = self.ask_status(timeout_seconds)
        status = dict(statuses.get(self._member.node, {}))
        status["client"] = super().stats(timeout_seconds)
        return status


def _client_settings(settings: MemberSettings, endpoint: str) -> ClientSettings:
    return ClientSettings(
        cluster=settings.cluster,
        endpoints=(endpoint,),
        secrets=settings.secrets,
        transport=settings.transport,
        name=f"{settings.node}.app",
        timing=settings.timing,
    )


def _rebuild_error(answer: dict[str, str]) -> CoordError:
    from coordlib.machine import commands  # the table of codes

    error = commands.error_reply(commands.encode_coded_error(answer["error"], answer["message"]))
    return error if error is not None else StartError(answer["message"])


def main() -> None:
    """The member's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the application, which then closes the pipe
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    line = sys.stdin.buffer.readline()
    if not line:
        return
    given = json.loads(line)
    member = given["member"]
    member["timing"] = Timing(**member["timing"])
    member["secrets"] = tuple(member["secrets"])
    settings = MemberSettings(**member)
    endpoint: str = given["endpoint"]
    try:
        driver = MemberDriver(settings, lambda: _storage(settings), also_bind=endpoint)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        driver.start()
    except CoordError as error:
        _tell({"error": error.code, "message": str(error)})
        return
    try:
        _tell({"ok": True})
        # A daemon thread of ours could keep a lock on the buffered reader: read the descriptor itself.
        while driver.is_running:
            is_readable, _, _ = select.select([0], [], [], 1.0)
            if is_readable and not os.read(0, 1024):
                return
        sys.exit(1)  # it has said why; the application is told by this process's end
    finally:
        driver.stop(STOP_SECONDS)
        # The application's to remove; but it may have been killed, and then nobody else is left to do it.
        shutil.rmtree(os.path.dirname(endpoint.removeprefix("ipc://")), ignore_errors=True)


def _storage(settings: MemberSettings) -> SegmentStorage:
    assert settings.data_dir is not None
    return SegmentStorage(
        PosixFileSystem(),
        settings.data_dir,
        node_id=settings.node,
        cluster_name=settings.cluster,
        new_disk_id=os.urandom(16),
        segment_size_bytes=settings.segment_size_bytes,
    )


def _tell(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
