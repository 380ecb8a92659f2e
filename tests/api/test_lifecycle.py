"""From construction to close: nothing starts by itself, everything ends, and failures say what to do."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import coordlib
from tests.api.conftest import SECRET, free_ports


def settings(directory: Path | None, **changes: Any) -> dict[str, Any]:
    """Of a member of one, which needs nobody else."""
    port = free_ports(1)[0]
    return {
        "name": "shop",
        "node": "n1",
        "members": {"n1": f"tcp://127.0.0.1:{port}"},
        "secret": SECRET,
        "data_dir": directory,
        "start_timeout": 5.0,
        **changes,
    }


def lonely(directory: Path, **changes: Any) -> dict[str, Any]:
    """Of a member whose only peer is not there."""
    ports = free_ports(2)
    members = {"n1": f"tcp://127.0.0.1:{ports[0]}", "n2": f"tcp://127.0.0.1:{ports[1]}"}
    return settings(directory, members=members, start_timeout=0.5, **changes)


def open_descriptors() -> set[str]:
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{descriptor} {os.readlink(f'/proc/self/fd/{descriptor}')}")
        except FileNotFoundError:
            pass
    return found


def test_constructing_starts_nothing(tmp_path: Path) -> None:
    """No thread, no descriptor, no file."""
    threads, descriptors = threading.enumerate(), open_descriptors()
    handles = [
        coordlib.Cluster(**settings(tmp_path / "data")),
        coordlib.AsyncCluster(**settings(tmp_path / "data")),
        coordlib.Cluster(**settings(tmp_path / "data", isolation="process")),
        coordlib.connect("tcp://127.0.0.1:1", cluster="shop", secret=SECRET),
        coordlib.local(),
    ]
    assert len(handles) == 5
    assert threading.enumerate() == threads
    assert open_descriptors() == descriptors
    assert list(tmp_path.iterdir()) == []


def test_a_handle_that_was_not_started_says_so() -> None:
    """Every operation, of both faces."""
    cluster = coordlib.local()
    with pytest.raises(coordlib.NotStarted, match="start"):
        cluster.map("m")["k"] = 1
    with pytest.raises(coordlib.NotStarted):
        cluster.lock("a").acquire()
    with pytest.raises(coordlib.NotStarted):
        cluster.stats()

    async def check() -> None:
        with pytest.raises(coordlib.NotStarted):
            await coordlib.AsyncCluster.local().map("m").get("k")

    asyncio.run(check())


def test_start_and_close_may_be_repeated() -> None:
    """Starting what runs and closing what is closed do nothing."""
    cluster = coordlib.local()
    cluster.start()
    cluster.start()
    cluster.map("m")["k"] = 1
    cluster.close()
    cluster.close()


def test_a_closed_handle_stays_closed() -> None:
    """It is not started again by mistake."""
    with coordlib.local() as cluster:
        lock = cluster.lock("a")
        grant = lock.acquire()
    with pytest.raises(coordlib.ClusterClosed):
        cluster.map("m")["k"] = 1
    with pytest.raises(coordlib.ClusterClosed):
        cluster.start()
    assert grant.state in (coordlib.GrantState.LOST, coordlib.GrantState.RELEASED)
    never = coordlib.local()
    never.close()
    with pytest.raises(coordlib.ClusterClosed):
        never.start()


def test_close_lets_go_of_everything(tmp_path: Path) -> None:
    """Threads, descriptors, the port and the directory."""
    with coordlib.local():
        pass  # what is made once for a process is made now
    arguments = settings(tmp_path / "data")
    with coordlib.Cluster(**arguments) as first:
        first.map("m")["k"] = 1
    threads, descriptors = threading.enumerate(), open_descriptors()
    with coordlib.Cluster(**arguments) as second:
        assert second.map("m")["k"] == 1
    assert threading.enumerate() == threads
    assert open_descriptors() == descriptors


def test_close_ends_calls_that_wait() -> None:
    """Nobody waits for a node that is gone."""
    cluster = coordlib.local()
    cluster.start()
    cluster.lock("a").acquire()
    ended: list[BaseException] = []
    asked = threading.Event()

    def wait() -> None:
        asked.set()
        try:
            cluster.lock("a").acquire()
        except coordlib.CoordError as error:
            ended.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    asked.wait(5)
    while cluster.lock("a").info().waiters == 0:
        pass
    cluster.close()
    thread.join(5)
    assert not thread.is_alive()
    assert len(ended) == 1


# -- failures to start -------------------------------------------------------------------------------------


def fails_to_start(arguments: dict[str, Any], error: type[coordlib.CoordError], *words: str) -> None:
    """Within its deadline, with these words, and with nothing left behind."""
    threads = set(threading.enumerate())
    begin = time.monotonic()
    cluster = coordlib.Cluster(**arguments)
    with pytest.raises(error) as caught:
        cluster.start()
    assert time.monotonic() - begin < arguments["start_timeout"] + 3
    for word in words:
        assert word in str(caught.value), caught.value
    assert {t for t in threading.enumerate() if t.name.startswith("coordlib")} <= threads


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    """With its address."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        members = {"n1": f"tcp://127.0.0.1:{port}"}
        fails_to_start(settings(tmp_path / "d", members=members), coordlib.StartError, str(port), "taken")


def test_no_quorum_names_who_does_not_answer(tmp_path: Path) -> None:
    """And says what a new cluster needs."""
    fails_to_start(lonely(tmp_path / "d"), coordlib.StartError, "n2", "does not answer", "0.5 s")


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """It is a file here: root may write everywhere."""
    (tmp_path / "d").write_text("")
    fails_to_start(settings(tmp_path / "d"), coordlib.StartError, str(tmp_path / "d"), "data_dir")


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    """Two nodes on one disk would each forget what the other promised."""
    with coordlib.Cluster(**settings(tmp_path / "d")):
        fails_to_start(settings(tmp_path / "d"), coordlib.StartError, "in use")


def test_another_nodes_directory_is_refused(tmp_path: Path) -> None:
    """It belongs to a name."""
    with coordlib.Cluster(**settings(tmp_path / "d")):
        pass
    port = free_ports(1)[0]
    other = settings(tmp_path / "d", node="n9", members={"n9": f"tcp://127.0.0.1:{port}"})
    fails_to_start(other, coordlib.StartError, "n1", "n9")
    fails_to_start(settings(tmp_path / "d", name="other"), coordlib.StartError, "shop", "other")


def test_a_failed_start_may_be_tried_again(tmp_path: Path) -> None:
    """The handle is as it was before."""
    (tmp_path / "d").write_text("")
    cluster = coordlib.Cluster(**settings(tmp_path / "d"))
    with pytest.raises(coordlib.StartError):
        cluster.start()
    (tmp_path / "d").unlink()
    with cluster:
        cluster.map("m")["k"] = 1


def test_a_client_that_finds_nobody_says_where_it_looked() -> None:
    """Within its deadline."""
    port = free_ports(1)[0]
    client = coordlib.connect(f"tcp://127.0.0.1:{port}", cluster="shop", secret=SECRET, start_timeout=0.5)
    with pytest.raises(coordlib.StartError, match=str(port)):
        client.start()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"secret": None}, "secret"),
        ({"secret": ""}, "secret"),
        ({"secret": "short"}, "secret"),
        ({"members": {}}, "members"),
        ({"members": {"n2": "tcp://127.0.0.1:7400"}}, "n1"),
        ({"members": {"n1": "127.0.0.1:7400"}}, "tcp://"),
        ({"members": {"n1": "tcp://127.0.0.1:99999"}}, "tcp://"),
        ({"members": {"n1": "tcp://10.0.0.1:1", "n2": "tcp://10.0.0.1:1"}}, "same endpoint"),
        ({"node": "no spaces please"}, "node"),
        ({"name": ""}, "cluster"),
        ({"heartbeat": 0.2}, "election_timeout"),
        ({"election_timeout": (0.3, 0.31)}, "election_timeout"),
        ({"session_ttl": 0.5}, "session_ttl"),
        ({"session_ttl": float("nan")}, "session_ttl"),
        ({"drift_bound": 0.5}, "drift_bound"),
        ({"isolation": "both"}, "isolation"),
        ({"reads": "dirty"}, "reads"),
        ({"data_dir": None, "members": {"n1": "tcp://a:1", "n2": "tcp://b:1"}}, "data_dir"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_that_cannot_work_are_refused_at_construction(changes: dict[str, Any], word: str) -> None:
    """The message names the setting."""
    with pytest.raises(coordlib.ConfigError) as caught:
        coordlib.Cluster(**settings(Path("/nowhere"), **changes))
    assert word in str(caught.value)
    assert SECRET not in str(caught.value)


def test_an_unknown_transport_is_refused_at_construction() -> None:
    """With the names of those that are there."""
    with pytest.raises(coordlib.TransportNotFound, match="zmq"):
        coordlib.Cluster(**settings(None, transport="pigeons"))


# -- from the environment and from files -------------------------------------------------------------------

ENVIRONMENT = {
    "COORDLIB_CLUSTER": "shop",
    "COORDLIB_NODE": "a",
    "COORDLIB_MEMBERS": "a=tcp://10.0.0.1:7400, b=tcp://10.0.0.2:7400",
    "COORDLIB_SECRET": SECRET,
    "COORDLIB_DATA_DIR": "/var/lib/shop",
    "COORDLIB_SESSION_TTL": "5",
    "COORDLIB_ELECTION_TIMEOUT": "0.5,1",
}


def test_the_environment_describes_a_member() -> None:
    """All of it at once."""
    cluster = coordlib.Cluster.from_env(ENVIRONMENT)
    assert isinstance(cluster, coordlib.Cluster)
    assert isinstance(coordlib.AsyncCluster.from_env(ENVIRONMENT), coordlib.AsyncCluster)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"COORDLIB_NODE": ""}, "COORDLIB_NODE"),
        ({"COORDLIB_MEMBERS": "a"}, "COORDLIB_MEMBERS"),
        ({"COORDLIB_SESSION_TTL": "soon"}, "COORDLIB_SESSION_TTL"),
        ({"COORDLIB_COLOUR": "red"}, "COORDLIB_COLOUR"),
        ({"COORDLIB_SECRET": ""}, "COORDLIB_SECRET"),
        ({"COORDLIB_ELECTION_TIMEOUT": "1"}, "election_timeout"),
        ({"COORDLIB_BOOTSTRAP": "maybe"}, "COORDLIB_BOOTSTRAP"),
    ],
)
def test_an_environment_that_is_wrong_is_refused(changes: dict[str, str], word: str) -> None:
    """The message names the variable."""
    with pytest.raises(coordlib.ConfigError, match=word):
        coordlib.Cluster.from_env({**ENVIRONMENT, **changes})


FILE = f"""
cluster = "shop"
node = "a"
secret = "{SECRET}"
data_dir = "data"
election_timeout = [0.5, 1.0]
[members]
a = "tcp://10.0.0.1:7400"
b = "tcp://10.0.0.2:7400"
"""


def test_a_file_describes_a_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the secret in it, beside it, or in the environment."""
    monkeypatch.delenv("COORDLIB_SECRET", raising=False)
    path = tmp_path / "coordlib.toml"
    path.write_text(FILE)
    coordlib.Cluster.from_file(path)
    path.write_text(FILE.replace(f'secret = "{SECRET}"', 'secret_file = "secret"'))
    (tmp_path / "secret").write_text(SECRET + "\n")
    coordlib.Cluster.from_file(str(path))
    path.write_text(FILE.replace(f'secret = "{SECRET}"', ""))
    with pytest.raises(coordlib.ConfigError, match="secret"):
        coordlib.Cluster.from_file(path)
    monkeypatch.setenv("COORDLIB_SECRET", SECRET)
    coordlib.Cluster.from_file(path)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("cluster =", "TOML"),
        (FILE.replace("node", "nodes", 1), "nodes"),
        (FILE.replace('node = "a"', ""), "node"),
        (FILE.replace('"a"', '"c"'), "c"),
        (FILE.replace("[0.5, 1.0]", "7"), "election_timeout"),
    ],
)
def test_a_file_that_is_wrong_is_refused(tmp_path: Path, text: str, word: str) -> None:
    """The message names the file or the key."""
    path = tmp_path / "coordlib.toml"
    path.write_text(text)
    with pytest.raises(coordlib.ConfigError, match=word):
        coordlib.Cluster.from_file(path)
    with pytest.raises(coordlib.ConfigError, match="missing"):
        coordlib.Cluster.from_file(tmp_path / "missing.toml")
