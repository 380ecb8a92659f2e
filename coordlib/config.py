"""Settings, checked when they are made: what constructs, works together.

Numbers carry their unit in the name and are whole milliseconds. The public constructors take seconds,
as the standard library does, and convert here. Every ConfigError names the setting and what to do.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from coordlib.errors import ConfigError

__all__ = ["ClientSettings", "MemberSettings", "Timing", "load_environment", "load_file"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")
_ENDPOINT = re.compile(r"(tcp://(\[[0-9A-Fa-f:.]+\]|[^:/\s\[\]]+):(\d{1,5})|ipc://.+|memory://.+)\Z")
MEMBERS_MAX = 15


def check_name(value: object, setting: str) -> str:
    if not isinstance(value, str) or not _NAME.match(value):
        raise ConfigError(
            f"{setting} must be 1 to 63 letters, digits, '.', '_' or '-', starting with a letter or digit; "
            f"got {value!r}"
        )
    return value


def check_endpoint(value: object, setting: str) -> str:
    match = _ENDPOINT.match(value) if isinstance(value, str) else None
    if match is None or (match.group(3) and int(match.group(3)) > 65535):
        raise ConfigError(f"{setting} must look like tcp://10.0.0.1:7400; got {value!r}")
    return str(value)


def check_secrets(value: object) -> tuple[str, ...]:
    """One secret or a sequence of them, newest first. Strength is checked where keys are derived."""
    secrets = (value,) if isinstance(value, str | bytes) else value
    if not isinstance(secrets, Sequence) or not secrets:
        raise ConfigError(
            "secret is missing: make one with `coordlib keys new` and give the same to every member "
            "(for example in COORDLIB_SECRET)"
        )
    texts = tuple(s.decode("utf-8", "surrogateescape") if isinstance(s, bytes) else s for s in secrets)
    if not all(isinstance(s, str) and s for s in texts):
        raise ConfigError("secret must be a non-empty string, or a list of them with the newest first")
    if len(texts) > 4:
        raise ConfigError("secret takes at most 4 entries: the new one and those still in use")
    return texts


def milliseconds(seconds: object, setting: str, *, low: int = 1, high: int = 86_400_000) -> int:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise ConfigError(f"{setting} is a number of seconds; got {seconds!r}")
    value = round(seconds * 1000) if seconds == seconds and abs(seconds) < 1e9 else -1
    if not low <= value <= high:
        raise ConfigError(
            f"{setting} must be between {low / 1000:g} and {high / 1000:g} seconds; got {seconds!r}"
        )
    return value


def drift_percent(bound: object) -> int:
    """The drift bound in whole percent, rounded up."""
    if isinstance(bound, bool) or not isinstance(bound, int | float) or not 0 <= bound <= 0.2:
        raise ConfigError(f"drift_bound must be between 0 and 0.2; got {bound!r}")
    return math.ceil(round(bound * 100, 6))


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """
    The times of a cluster. All members should be given the same.

    The defaults suit one data centre: a leader that dies is replaced in well under a second.
    """

    heartbeat_ms: int = 50
    election_ms_min: int = 300
    election_ms_max: int = 600
    session_ttl_ms: int = 10_000
    drift_percent: int = 1
    request_timeout_ms: int = 10_000
    start_timeout_ms: int = 30_000

    def __post_init__(self) -> None:
        if self.heartbeat_ms < 5:
            raise ConfigError(f"heartbeat of {self.heartbeat_ms} ms: use at least 0.005 seconds")
        if self.election_ms_min < 4 * self.heartbeat_ms:
            raise ConfigError(
                f"election_timeout starts at {self.election_ms_min} ms, but a heartbeat every {self.heartbeat_ms} ms "
                f"needs at least {4 * self.heartbeat_ms} ms, or one late heartbeat costs the leadership: "
                "raise election_timeout or lower heartbeat"
            )
        if self.election_ms_max < self.election_ms_min * 3 // 2:
            raise ConfigError(
                f"election_timeout ({self.election_ms_min}, {self.election_ms_max}) ms leaves too little room for "
                "chance: the upper bound must be at least 1.5 times the lower, or elections split again and again"
            )
        if self.session_ttl_ms < 2 * self.election_ms_max:
            raise ConfigError(
                f"session_ttl of {self.session_ttl_ms} ms would expire during one election ({self.election_ms_max} ms): "
                f"use at least {2 * self.election_ms_max / 1000:g} seconds"
            )
        if not 0 <= self.drift_percent <= 20:
            raise ConfigError(f"drift_bound must be between 0 and 0.2; got {self.drift_percent / 100}")

    @property
    def keep_alive_ms(self) -> int:
        return self.session_ttl_ms // 4

    @classmethod
    def from_seconds(
        cls,
        *,
        heartbeat: float,
        election_timeout: tuple[float, float],
        session_ttl: float,
        drift_bound: float,
        request_timeout: float,
        start_timeout: float,
    ) -> Timing:
        try:
            low, high = election_timeout
        except (TypeError, ValueError):
            raise ConfigError(
                f"election_timeout is a pair (lowest, highest) in seconds; got {election_timeout!r}"
            ) from None
        return cls(
            heartbeat_ms=milliseconds(heartbeat, "heartbeat"),
            election_ms_min=milliseconds(low, "election_timeout"),
            election_ms_max=milliseconds(high, "election_timeout"),
            session_ttl_ms=milliseconds(session_ttl, "session_ttl"),
            drift_percent=drift_percent(drift_bound),
            request_timeout_ms=milliseconds(request_timeout, "request_timeout"),
            start_timeout_ms=milliseconds(start_timeout, "start_timeout"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberSettings:
    """One member of a cluster: who it is, who the others are, where it keeps its disk."""

    cluster: str
    node: str
    members: Mapping[str, str]
    secrets: tuple[str, ...] = field(repr=False)
    data_dir: str | None
    bind: str | None = None
    transport: str = "zmq"
    bootstrap: bool = False
    reads: str = "lease"
    timing: Timing = field(default_factory=Timing)
    segment_size_bytes: int = 16 * 1024 * 1024

    def __post_init__(self) -> None:
        check_name(self.cluster, "cluster")
        check_name(self.node, "node")
        if not isinstance(self.members, Mapping) or not self.members:
            raise ConfigError(
                "members is a mapping of every member's name to its endpoint, this node included"
            )
        if len(self.members) > MEMBERS_MAX:
            raise ConfigError(
                f"{len(self.members)} members: a cluster has at most {MEMBERS_MAX}; attach the others with connect()"
            )
        by_endpoint: dict[str, str] = {}
        for name, endpoint in self.members.items():
            check_name(name, "a member's name")
            check_endpoint(endpoint, f"the endpoint of member {name!r}")
            other = by_endpoint.setdefault(endpoint, name)
            if other != name:
                raise ConfigError(
                    f"members {other!r} and {name!r} have the same endpoint {endpoint}: each needs its own"
                )
        if self.node not in self.members:
            raise ConfigError(
                f"node {self.node!r} is not among the members ({', '.join(sorted(self.members))}): add it, or attach "
                "without a vote by coordlib.connect(...)"
            )
        if self.bind is not None:
            check_endpoint(self.bind, "bind")
        if self.reads not in ("quorum", "lease"):
            raise ConfigError(f"reads is 'quorum' or 'lease'; got {self.reads!r}")
        if self.data_dir is None and len(self.members) > 1:
            raise ConfigError(
                "data_dir is missing: a member keeps its vote and its log there, and loses acknowledged writes without. "
                "Give a directory of its own on a local disk"
            )
        if self.data_dir is not None and (not isinstance(self.data_dir, str) or not self.data_dir):
            raise ConfigError(f"data_dir is a path; got {self.data_dir!r}")

    @property
    def endpoint(self) -> str:
        return self.members[self.node]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings:
    """A client: no vote, no disk; it knows some members' endpoints and learns the others."""

    cluster: str
    endpoints: tuple[str, ...]
    secrets: tuple[str, ...] = field(repr=False)
    transport: str = "zmq"
    name: str = ""
    timing: Timing = field(default_factory=Timing)

    def __post_init__(self) -> None:
        check_name(self.cluster, "cluster")
        if not self.endpoints:
            raise ConfigError("no endpoint to connect to: give at least one member's, as tcp://10.0.0.1:7400")
        for endpoint in self.endpoints:
            check_endpoint(endpoint, "the endpoint to connect to")


_SECONDS = ("heartbeat", "session_ttl", "drift_bound", "request_timeout", "start_timeout")
_KNOWN = {
    "name",
    "node",
    "members",
    "secret",
    "secret_file",
    "data_dir",
    "bind",
    "transport",
    "isolation",
    "bootstrap",
    "reads",
    "election_timeout",
    *_SECONDS,
}


def load_environment(environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """
    Read COORDLIB_* variables into the keyword arguments of `Cluster`.

    COORDLIB_CLUSTER, COORDLIB_NODE, COORDLIB_MEMBERS ("a=tcp://10.0.0.1:7400,b=tcp://..."), COORDLIB_SECRET (several
    separated by commas, newest first; so a passphrase here has no comma) or COORDLIB_SECRET_FILE, COORDLIB_DATA_DIR, and
    the other arguments by their names.

    Raises:
        ConfigError: A variable is missing, unknown or malformed.
    """
    environment = os.environ if environment is None else environment
    found = {k[9:].lower(): v for k, v in environment.items() if k.startswith("COORDLIB_") and v != ""}
    found.pop("endpoints", None)  # for programs that connect() in the same environment
    if "cluster" in found:
        found["name"] = found.pop("cluster")
    for required, variable in (("name", "CLUSTER"), ("node", "NODE"), ("members", "MEMBERS")):
        if required not in found:
            raise ConfigError(f"environment variable COORDLIB_{variable} is not set")
    unknown = sorted(set(found) - _KNOWN)
    if unknown:
        raise ConfigError(f"unknown environment variable COORDLIB_{unknown[0].upper()}")
    values: dict[str, Any] = dict(found)
    values["members"] = _parse_members(found["members"])
    if "secret" in found:
        values["secret"] = [s.strip() for s in found["secret"].split(",") if s.strip()]
    if "bootstrap" in found:
        if found["bootstrap"] not in ("0", "1", "true", "false"):
            raise ConfigError("COORDLIB_BOOTSTRAP is 1 or 0")
        values["bootstrap"] = found["bootstrap"] in ("1", "true")
    for key in _SECONDS:
        if key in found:
            values[key] = _parse_seconds(found[key], f"COORDLIB_{key.upper()}")
    if "election_timeout" in found:
        parts = found["election_timeout"].split(",")
        values["election_timeout"] = tuple(_parse_seconds(p, "COORDLIB_ELECTION_TIMEOUT") for p in parts)
    return _resolve_secret_file(values)


def load_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """
    Read a TOML file into the keyword arguments of `Cluster`; its keys are their names, `members` is a table.

    A `secret_file` (relative to the file) keeps the secret out of it; COORDLIB_SECRET in the environment wins over both.

    Raises:
        ConfigError: The file cannot be read, is not TOML, or has an unknown key.
    """
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except OSError as exc:
        raise ConfigError(f"cannot read {os.fspath(path)}: {exc.strerror or exc}") from exc
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{os.fspath(path)} is not valid TOML: {exc}") from exc
    if "cluster" in values:
        values["name"] = values.pop("cluster")
    unknown = sorted(set(values) - _KNOWN)
    if unknown:
        raise ConfigError(
            f"{os.fspath(path)}: unknown key {unknown[0]!r}; known are {', '.join(sorted(_KNOWN))}"
        )
    missing = sorted({"name", "node", "members"} - set(values))
    if missing:
        raise ConfigError(f"{os.fspath(path)}: key {missing[0].replace('name', 'cluster')!r} is missing")
    directory = os.path.dirname(os.path.abspath(path))
    for key in ("data_dir", "secret_file"):
        if isinstance(values.get(key), str):
            values[key] = os.path.join(directory, values[key])
    if os.environ.get("COORDLIB_SECRET"):
        values.pop("secret_file", None)
        values["secret"] = [s.strip() for s in os.environ["COORDLIB_SECRET"].split(",") if s.strip()]
    if isinstance(values.get("election_timeout"), list):
        values["election_timeout"] = tuple(values["election_timeout"])
    return _resolve_secret_file(values)


def _resolve_secret_file(values: dict[str, Any]) -> dict[str, Any]:
    path = values.pop("secret_file", None)
    if path is None:
        return values
    if "secret" in values:
        raise ConfigError("give secret or secret_file, not both")
    try:
        with open(path, encoding="utf-8") as file:
            values["secret"] = [line.strip() for line in file if line.strip() and not line.startswith("#")]
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot read secret_file {path}: {exc}") from exc
    return values


def _parse_members(text: str) -> dict[str, str]:
    members: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, endpoint = item.partition("=")
        if not equals:
            raise ConfigError(f"COORDLIB_MEMBERS: {item!r} is not name=endpoint")
        if name in members:
            raise ConfigError(f"COORDLIB_MEMBERS: {name!r} is there twice")
        members[name] = endpoint
    return members


def _parse_seconds(text: str, setting: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{setting} is a number of seconds; got {text!r}") from None
