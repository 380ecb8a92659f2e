"""Where a command's settings come from: its arguments, a file, the environment."""

from __future__ import annotations

import argparse
import os
from typing import Any

from coordlib.config import (
    ClientSettings,
    Timing,
    check_secrets,
    load_environment,
    load_file,
    milliseconds,
)
from coordlib.errors import ConfigError

__all__ = ["client_settings", "member_arguments"]


def member_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """
    The keyword arguments of `Cluster`: from --config, or from the environment with arguments over it.

    Raises:
        ConfigError: Something is missing, unknown or wrong.
    """
    given = {
        name: value
        for name in ("cluster", "node", "members", "data_dir", "bind", "secret_file", "start_timeout")
        if (value := getattr(arguments, name, None)) is not None
    }
    if getattr(arguments, "bootstrap", False):
        given["bootstrap"] = "1"
    if arguments.config is not None:
        for name in ("cluster", "node", "members", "secret_file"):
            if name in given:
                raise ConfigError(f"give --config or --{name.replace('_', '-')}, not both")
        values = load_file(arguments.config)
        values.update(given)
        if "bootstrap" in given:
            values["bootstrap"] = True
        return values
    environment = dict(os.environ)
    environment.pop("COORDLIB_ENDPOINTS", None)  # a client's, which may be set beside
    if "secret_file" in given:
        environment.pop("COORDLIB_SECRET", None)
    environment.update({f"COORDLIB_{name.upper()}": str(value) for name, value in given.items()})
    return load_environment(environment)


def client_settings(arguments: argparse.Namespace, name: str) -> ClientSettings:
    """
    How to attach: --endpoint (or COORDLIB_ENDPOINTS) with --cluster, or the members of a member's settings.

    Raises:
        ConfigError: Something is missing or wrong.
    """
    endpoints = arguments.endpoint
    if endpoints is None and arguments.config is None:
        endpoints = os.environ.get("COORDLIB_ENDPOINTS")
    if endpoints is None:
        if arguments.config is None and "COORDLIB_MEMBERS" not in os.environ:
            raise ConfigError(
                "no member to ask: give --endpoint tcp://HOST:PORT and --cluster NAME, or --config FILE, or set the "
                "COORDLIB_* variables of a member"
            )
        values = load_file(arguments.config) if arguments.config is not None else _environment()
        members = values["members"]
        if not isinstance(members, dict):
            raise ConfigError("members is a table of every member's name and endpoint")
        endpoints = ",".join(str(endpoint) for endpoint in members.values())
        cluster, secret, transport = values["name"], values.get("secret"), values.get("transport", "zmq")
    else:
        cluster = arguments.cluster or os.environ.get("COORDLIB_CLUSTER")
        if not cluster:
            raise ConfigError("the cluster's name is missing: give --cluster, or set COORDLIB_CLUSTER")
        secret, transport = _secret(arguments.secret_file), os.environ.get("COORDLIB_TRANSPORT", "zmq")
    timeout_ms = milliseconds(arguments.timeout, "--timeout", low=100, high=600_000)
    return ClientSettings(
        cluster=cluster,
        endpoints=tuple(text.strip() for text in endpoints.split(",") if text.strip()),
        secrets=check_secrets(secret),
        transport=transport,
        name=name,
        timing=Timing(start_timeout_ms=timeout_ms, request_timeout_ms=timeout_ms),
    )


def _environment() -> dict[str, Any]:
    environment = dict(os.environ)
    environment.setdefault("COORDLIB_NODE", "observer")  # not needed for asking
    return load_environment(environment)


def _secret(path: str | None) -> list[str] | None:
    path = path or os.environ.get("COORDLIB_SECRET_FILE")
    if path is None or (os.environ.get("COORDLIB_SECRET") and path == os.environ.get("COORDLIB_SECRET_FILE")):
        return [text.strip() for text in os.environ.get("COORDLIB_SECRET", "").split(",") if text.strip()]
    try:
        with open(path, encoding="utf-8") as file:
            return [line.strip() for line in file if line.strip() and not line.startswith("#")]
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot read secret file {path}: {exc}") from exc
