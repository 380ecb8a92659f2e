"""`coordlib status` and `coordlib locks`, against real members over real sockets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordlib import StartError
from coordlib.cli import main
from coordlib.cli.status import render
from tests.cli.conftest import Members, free_endpoint

OTHER_SECRET = "quite another secret as long as it needs to be"


@pytest.fixture
def environment(three: Members, monkeypatch: pytest.MonkeyPatch) -> Members:
    for name, value in three.environment.items():
        monkeypatch.setenv(name, value)
    return three


def test_status_shows_every_member_of_a_healthy_cluster(
    environment: Members, capsys: pytest.CaptureFixture[str]
) -> None:
    """One leader, two followers, indexes, sessions; exit code 0 and no word of problems."""
    assert main(["status"]) == 0
    out = capsys.readouterr().out
    assert "leads term" in out
    rows = [line.split() for line in out.splitlines() if line[:2] in ("a ", "b ", "c ")]
    assert sorted(row[1] for row in rows) == ["follower", "follower", "leader"]
    assert all(int(number) > 0 for row in rows for number in row[2:5])
    assert {"3"} == {row[6] for row in rows}  # a session for each member's application, and none for this
    assert sorted(environment.endpoints.values()) == sorted(row[-1] for row in rows)
    assert "problems" not in out


def test_status_learns_the_other_members_from_one_endpoint(
    three: Members, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """--endpoint, --cluster and a secret file are enough; as JSON, it holds all that the members tell."""
    (tmp_path / "secret").write_text(f"# of the tests\n{three.secret}\n")
    monkeypatch.setenv("COORDLIB_SECRET", OTHER_SECRET)  # the argument wins
    arguments = ["--endpoint", three.endpoints["b"], "--cluster", "shop"]
    assert main(["status", "--json", *arguments, "--secret-file", str(tmp_path / "secret")]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert sorted(answer["members"]) == ["a", "b", "c"]
    assert answer["problems"] == []
    assert answer["members"]["a"]["wire"]["frames_received"] > 0


def test_status_reads_a_members_file(
    three: Members, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    members = "\n".join(f'{name} = "{endpoint}"' for name, endpoint in three.endpoints.items())
    config = tmp_path / "a.toml"
    config.write_text(f'cluster = "shop"\nnode = "a"\nsecret = "{three.secret}"\n[members]\n{members}\n')
    assert main(["status", "--config", str(config)]) == 0
    assert "leads term" in capsys.readouterr().out


def test_status_needs_no_leader(environment: Members, capsys: pytest.CaptureFixture[str]) -> None:
    """With one of three left there is no quorum: it says so, shows the one, and names the missing."""
    environment.close("b")
    environment.close("c")
    assert main(["status"]) == 1
    out = capsys.readouterr().out
    assert "NO LEADER" in out
    (row,) = [line.split() for line in out.splitlines() if line.startswith("a ")]
    assert row[1] != "leader"
    assert int(row[4]) > 0  # what it has applied
    for name in ("b", "c"):
        assert f"{name} at {environment.endpoints[name]} does not answer" in out


def test_a_wrong_secret_of_the_asker_is_told_in_words(
    environment: Members, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COORDLIB_SECRET", OTHER_SECRET)
    assert main(["status", "--timeout", "1"]) == 2
    captured = capsys.readouterr()
    assert "COORDLIB_SECRET" in captured.err
    assert "Traceback" not in captured.err
    assert main(["status", "--timeout", "1", "--json"]) == 2
    assert any("COORDLIB_SECRET" in text for text in json.loads(capsys.readouterr().out)["problems"])


def test_a_wrong_secret_of_a_member_is_told_in_words(
    environment: Members, capsys: pytest.CaptureFixture[str]
) -> None:
    """The member with the wrong one does not start, and the others' status says who was refused and why."""
    environment.close("c")
    with pytest.raises(StartError, match="COORDLIB_SECRET"):
        environment.make("c", secret=OTHER_SECRET, start_timeout=1.5).start()
    assert main(["status"]) == 1
    out = capsys.readouterr().out
    assert "a wrong secret" in out
    assert "c at" in out


def test_nobody_there_is_an_error_within_the_timeout(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = free_endpoint()
    monkeypatch.setenv("COORDLIB_SECRET", OTHER_SECRET)
    assert main(["status", "--endpoint", endpoint, "--cluster", "shop", "--timeout", "0.3"]) == 2
    assert f"nobody answers at {endpoint}" in capsys.readouterr().err


def test_nobody_named_to_ask_is_an_error_that_says_what_to_give(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == 2
    assert "--endpoint" in capsys.readouterr().err
    assert main(["status", "--endpoint", "tcp://127.0.0.1:1"]) == 2
    assert "--cluster" in capsys.readouterr().err
    assert main(["locks", "--endpoint", "tcp://127.0.0.1:1", "--cluster", "shop"]) == 2
    assert "secret is missing" in capsys.readouterr().err


def test_troubles_are_told_in_words_and_once() -> None:
    """Counters of the wire and problems of members; a member that is not formed has no indexes to show."""
    status = {
        "is_formed": False,
        "clients": 1,
        "problems": ["the disk is another's"],
        "wire_problems": {"b": "cannot talk to b", "b2": "cannot talk to b"},
        "wire": {"auth-failed": 1200, "refused-wrong-key": 3, "frames_sent": 9, "quarantined": 0},
    }
    text = render("shop", {"a": status}, ["cannot talk to c"])
    assert "not formed yet" in text
    for words in ("1,200 messages that failed authentication", "3 connections refused", "another's", "to c"):
        assert words in text
    assert text.count("cannot talk to b") == 1
    assert "held off" not in text


def test_locks_lists_holders_and_waiters(environment: Members, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = environment.clusters["b"]
    assert main(["locks"]) == 0
    assert "no lock is held" in capsys.readouterr().out
    with cluster.lock("invoice-42") as grant, cluster.lock("über"):
        assert main(["locks", "--json"]) == 0
        locks = json.loads(capsys.readouterr().out)
        assert [("invoice-42", grant.token), ("über", grant.token + 1)] == [
            (lock["lock"], lock["token"]) for lock in locks
        ]
        assert {("b", 0)} == {(lock["holder"], lock["waiters"]) for lock in locks}
        assert main(["locks"]) == 0
        assert ["invoice-42", "b", str(grant.token), "0"] in [
            line.split() for line in capsys.readouterr().out.splitlines()
        ]


def test_locks_without_a_leader_is_an_error(environment: Members, capsys: pytest.CaptureFixture[str]) -> None:
    environment.close("b")
    environment.close("c")
    assert main(["locks", "--timeout", "0.5"]) == 2
    assert "no leader" in capsys.readouterr().err


# -- serve ---------------------------------------------------------------------------------------------------


class Served:
    """`coordlib serve` in a process of its own."""

    def __init__(self, directory: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("COORDLIB_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "coordlib.cli", "serve", *arguments],
            cwd=directory,
            env={**inherited, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def first_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def end(self, number: int) -> tuple[int, str]:
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=20)
        return self.process.returncode, err


@pytest.fixture
def served() -> Iterator[list[Served]]:
    running: list[Served] = []
    yield running
    for one in running:
        if one.process.poll() is None:
            one.process.kill()
        one.process.communicate()


def config_of(directory: Path) -> Path:
    path = directory / "solo.toml"
    path.write_text(
        f'cluster = "shop"\nnode = "solo"\nsecret = "{OTHER_SECRET}"\ndata_dir = "data"\n'
        f'[members]\nsolo = "{free_endpoint()}"\n'
    )
    return path


def test_serve_runs_until_it_is_asked_to_stop_and_comes_back_from_its_disk(
    tmp_path: Path, served: list[Served], capsys: pytest.CaptureFixture[str]
) -> None:
    """One line when it serves; SIGTERM and SIGINT both end it in good order; the term goes on rising."""
    config = config_of(tmp_path)
    for number, term in ((signal.SIGTERM, 1), (signal.SIGINT, 2)):
        served.append(Served(tmp_path, "--config", str(config)))
        line = served[-1].first_line()
        assert "solo serves cluster 'shop' at tcp://127.0.0.1:" in line
        assert f"solo leads term {term}" in line
        assert main(["status", "--config", str(config)]) == 0
        capsys.readouterr()
        code, err = served[-1].end(number)
        assert code == 0
        assert "Traceback" not in err


def test_serve_takes_flags_over_the_environment(tmp_path: Path, served: list[Served]) -> None:
    environment = {"COORDLIB_SECRET": OTHER_SECRET, "COORDLIB_CLUSTER": "other", "COORDLIB_NODE": "solo"}
    members = f"solo={free_endpoint()}"
    arguments = ("--cluster", "shop", "--members", members, "--data-dir", str(tmp_path / "data"))
    served.append(Served(tmp_path, *arguments, environment=environment))
    assert "cluster 'shop'" in served[0].first_line()
    assert (tmp_path / "data").is_dir()
    assert served[0].end(signal.SIGTERM)[0] == 0


def test_a_signal_during_the_start_ends_it_too(tmp_path: Path, served: list[Served]) -> None:
    """Waiting for members that are not there, it can be stopped as well."""
    members = f"a={free_endpoint()},b={free_endpoint()}"
    environment = {"COORDLIB_SECRET": OTHER_SECRET, "COORDLIB_CLUSTER": "shop", "COORDLIB_NODE": "a"}
    arguments = ("--verbose", "--members", members, "--data-dir", str(tmp_path / "data"))
    served.append(Served(tmp_path, *arguments, environment=environment))
    err = served[0].process.stderr
    assert err is not None
    while "node started" not in err.readline():
        assert served[0].process.poll() is None
    code, rest = served[0].end(signal.SIGTERM)
    assert code == 0
    assert "Traceback" not in rest


def test_serve_tells_what_stands_in_the_way(
    solo: Members, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No settings, an unknown key, a port that is taken: one message each, exit code 2."""
    assert main(["serve"]) == 2
    assert "COORDLIB_CLUSTER is not set" in capsys.readouterr().err
    (tmp_path / "bad.toml").write_text('cluster = "shop"\ncolour = "red"\n')
    assert main(["serve", "--config", str(tmp_path / "bad.toml")]) == 2
    assert "colour" in capsys.readouterr().err
    assert main(["serve", "--config", str(tmp_path / "bad.toml"), "--node", "a"]) == 2
    assert "not both" in capsys.readouterr().err
    for name, value in solo.environment.items():
        monkeypatch.setenv(name, value)
    assert main(["serve", "--node", "solo", "--data-dir", str(tmp_path / "other")]) == 2
    assert "is taken" in capsys.readouterr().err
