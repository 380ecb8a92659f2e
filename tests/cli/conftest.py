"""Members of real clusters within the test's process, on ports that were free a moment ago."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordlib import Cluster, StartError

SECRET = "a secret of the tests and long enough"
ATTEMPTS = 3


def free_endpoint() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


class Members:
    """Some members of the cluster "shop", by name."""

    def __init__(self, names: list[str], directory: Path) -> None:
        self.directory = directory
        self.secret = SECRET
        self.endpoints = {name: free_endpoint() for name in names}
        self.clusters: dict[str, Cluster] = {}

    def make(self, name: str, *, secret: str = SECRET, start_timeout: float = 15) -> Cluster:
        return Cluster(
            "shop",
            node=name,
            members=self.endpoints,
            secret=secret,
            data_dir=self.directory / name,
            start_timeout=start_timeout,
        )

    def start(self, names: list[str]) -> None:
        errors: list[BaseException] = []

        def start(cluster: Cluster) -> None:
            try:
                cluster.start()
            except BaseException as error:
                errors.append(error)

        made = {name: self.make(name) for name in names}
        threads = [threading.Thread(target=start, args=(cluster,)) for cluster in made.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.clusters.update(made)
        if errors:
            self.close()
            raise errors[0]

    def close(self, *names: str) -> None:
        for name in names or tuple(self.clusters):
            self.clusters.pop(name).close(timeout=1)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "COORDLIB_CLUSTER": "shop",
            "COORDLIB_MEMBERS": ",".join(f"{name}={endpoint}" for name, endpoint in self.endpoints.items()),
            "COORDLIB_SECRET": self.secret,
        }


def start_members(names: list[str], directory: Path) -> Members:
    for attempt in range(1, ATTEMPTS + 1):
        members = Members(names, directory / str(attempt))
        try:
            members.start(names)
        except StartError as error:
            if attempt == ATTEMPTS or "is taken" not in str(error):
                raise
            continue
        return members
    raise AssertionError("unreachable")


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Members]:
    """Three members that run, with a leader."""
    members = start_members(["a", "b", "c"], tmp_path)
    yield members
    members.close()


@pytest.fixture
def solo(tmp_path: Path) -> Iterator[Members]:
    """A cluster of one."""
    members = start_members(["solo"], tmp_path)
    yield members
    members.close()


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the settings of whoever runs it."""
    for name in [name for name in os.environ if name.startswith("COORDLIB_")]:
        monkeypatch.delenv(name)
