"""`coordlib doctor`: is this machine, with these settings, fit for a member? Changes nothing that lasts."""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
import time
from collections.abc import Callable
from typing import Any, Final

from coordlib.api.cluster import Cluster
from coordlib.cli.settings import member_arguments
from coordlib.errors import CoordError
from coordlib.wire.keys import SECRET_PREFIX

__all__ = ["run"]

SYNCS: Final = 50
SYNC_SIZE_BYTES: Final = 256
SLOW_SYNC_MS: Final = 50.0
CONNECT_SECONDS: Final = 1.0
OK, WARN, FAIL = "ok", "warn", "FAIL"

Finding = tuple[str, str]
"""(OK, WARN or FAIL, what was found)"""


def run(arguments: argparse.Namespace) -> int:
    """0 if nothing failed, 1 if something did."""
    findings: list[Finding] = [_curve()]
    try:
        values = member_arguments(arguments)
        Cluster(**values)  # constructing checks everything and starts nothing
    except CoordError as error:
        findings.append((FAIL, f"settings: {error}"))
    else:
        count = len(values["members"])
        findings.append((OK, f"settings: member {values['node']!r} of {count} in cluster {values['name']!r}"))
        checks: list[Callable[[dict[str, Any]], list[Finding]]] = [
            _members,
            _secret,
            _listening,
            _peers,
            _disk,
        ]
        for check in checks:
            findings.extend(check(values))
    for level, text in findings:
        print(f"{level:<5}{text}")
    return 1 if any(level == FAIL for level, _ in findings) else 0


def _curve() -> Finding:
    import zmq

    if zmq.has("curve"):
        return OK, f"encryption: libzmq {zmq.zmq_version()} has CURVE"
    return FAIL, "encryption: this libzmq was built without CURVE: install pyzmq from its wheel"


def _members(values: dict[str, Any]) -> list[Finding]:
    count = len(values["members"])
    if count % 2 == 0:
        return [(WARN, f"members: {count} tolerate no more failures than {count - 1} would")]
    return []


def _secret(values: dict[str, Any]) -> list[Finding]:
    secret = values.get("secret")
    secrets = [secret] if isinstance(secret, str) else list(secret or [])
    if all(text.startswith(SECRET_PREFIX) for text in secrets):
        return [(OK, "secret: generated")]
    return [
        (WARN, "secret: a passphrase is only as strong as it is hard to guess; better: `coordlib keys new`")
    ]


def _address(endpoint: str) -> tuple[str, int] | None:
    scheme, _, rest = endpoint.partition("://")
    if scheme != "tcp":
        return None
    host, _, port = rest.rpartition(":")
    return host.strip("[]"), int(port)


def _listening(values: dict[str, Any]) -> list[Finding]:
    endpoint = values.get("bind") or values["members"][values["node"]]
    address = _address(endpoint)
    if address is None:
        return []
    host, port = address
    try:
        family, kind, _, _, target = socket.getaddrinfo(
            "0.0.0.0" if host == "*" else host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(target)
    except OSError as exc:
        return [(FAIL, f"listening at {endpoint}: {exc.strerror or exc} (does this member run already?)")]
    return [(OK, f"listening at {endpoint}: the address is free")]


def _peers(values: dict[str, Any]) -> list[Finding]:
    findings: list[Finding] = []
    for name, endpoint in sorted(values["members"].items()):
        address = _address(endpoint)
        if name == values["node"] or address is None:
            continue
        try:
            socket.create_connection(address, CONNECT_SECONDS).close()
        except OSError as exc:
            findings.append(
                (
                    WARN,
                    f"member {name!r} at {endpoint}: {exc.strerror or exc} (fine if it is not started yet)",
                )
            )
        else:
            findings.append((OK, f"member {name!r} at {endpoint}: somebody listens there"))
    return findings


def _disk(values: dict[str, Any]) -> list[Finding]:
    directory = values.get("data_dir")
    if directory is None:
        return [(WARN, "data_dir: none, so this member forgets everything when it stops")]
    # The nearest directory that exists: the member makes the rest.
    existing = os.path.abspath(directory)
    while not os.path.isdir(existing):
        existing = os.path.dirname(existing)
    times_ms: list[float] = []
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".coordlib-doctor-") as file:
            for _ in range(SYNCS):
                start = time.perf_counter()
                os.write(file.fileno(), b"\0" * SYNC_SIZE_BYTES)
                os.fdatasync(file.fileno())
                times_ms.append((time.perf_counter() - start) * 1000)
    except OSError as exc:
        return [(FAIL, f"data_dir {directory}: cannot write in {existing}: {exc.strerror or exc}")]
    times_ms.sort()
    median, worst = times_ms[len(times_ms) // 2], times_ms[-1]
    text = (
        f"data_dir {directory}: fdatasync takes {median:.2f} ms (median), {worst:.2f} ms (worst of {SYNCS})"
    )
    if worst > SLOW_SYNC_MS:
        return [(WARN, f"{text}: writes slower than an election timeout cost the leadership")]
    return [(OK, text)]
