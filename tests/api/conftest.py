"""Clusters for the tests of what users hold."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import coordlib
from coordlib.errors import StartError

SECRET = "a-test-secret-that-is-long-enough-0123456789"
PORT_ATTEMPTS = 5


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago: somebody else may take them, so that callers try again."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def members_on(ports: list[int]) -> dict[str, str]:
    return {f"n{i}": f"tcp://127.0.0.1:{port}" for i, port in enumerate(ports, 1)}


class Trio:
    """Three members in this process, on real sockets and files."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.directory = directory
        self.settings = {"session_ttl": 3.0, "start_timeout": 15.0, **settings}
        self.members: dict[str, str] = {}
        self.nodes: dict[str, coordlib.Cluster] = {}

    def make(self, name: str, **settings: Any) -> coordlib.Cluster:
        arguments: dict[str, Any] = {"secret": SECRET, **self.settings, **settings}
        return coordlib.Cluster(
            "trio", node=name, members=self.members, data_dir=self.directory / name, **arguments
        )

    def start(self) -> None:
        for attempt in range(PORT_ATTEMPTS):
            self.members = members_on(free_ports(3))
            try:
                self.start_together(list(self.members))
                return
            except StartError as error:
                self.close()
                if attempt == PORT_ATTEMPTS - 1 or "taken" not in str(error):
                    raise

    def start_together(self, names: list[str]) -> None:
        import threading

        errors: list[BaseException] = []

        def start(cluster: coordlib.Cluster) -> None:
            try:
                cluster.start()
            except BaseException as error:
                errors.append(error)

        threads = []
        for name in names:
            self.nodes[name] = self.make(name)
            threads.append(threading.Thread(target=start, args=(self.nodes[name],)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    @property
    def leader(self) -> str:
        leader = next(iter(self.nodes.values())).stats()["leader"]
        assert isinstance(leader, str)
        return leader

    def connect(self, **settings: Any) -> coordlib.Cluster:
        arguments = {"secret": SECRET, "cluster": "trio", "session_ttl": 3.0, **settings}
        return coordlib.connect(",".join(self.members.values()), **arguments)

    def close(self) -> None:
        for node in self.nodes.values():
            node.close(timeout=1)
        self.nodes.clear()


@pytest.fixture
def cluster() -> Iterator[coordlib.Cluster]:
    with coordlib.local() as cluster:
        yield cluster


@pytest.fixture
def make_trio(tmp_path: Path) -> Iterator[Callable[..., Trio]]:
    trios: list[Trio] = []

    def make(**settings: Any) -> Trio:
        trio = Trio(tmp_path, **settings)
        trios.append(trio)
        trio.start()
        return trio

    yield make
    for trio in trios:
        trio.close()


@pytest.fixture
def trio(make_trio: Callable[..., Trio]) -> Trio:
    return make_trio()
