"""The command's small parts: keys, doctor, help, and errors without tracebacks."""

from __future__ import annotations

from pathlib import Path

import pytest

import coordlib
from coordlib.cli import main
from coordlib.wire.keys import ClusterKeys
from tests.cli.conftest import Members, free_endpoint


def test_keys_new_prints_a_secret_that_is_accepted_and_new_each_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    secrets = set()
    for _ in range(2):
        assert main(["keys", "new"]) == 0
        secrets.add(capsys.readouterr().out.strip())
    assert len(secrets) == 2
    for secret in secrets:
        ClusterKeys.from_secrets((secret,), "shop").wipe()


def test_version_and_wrong_arguments_end_as_argparse_ends_them(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code in ((["--version"], 0), (["conquer"], 2), ([], 2), (["demo", "--sabotage=all"], 2)):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert code == caught.value.code
    assert coordlib.__version__ in capsys.readouterr().out


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("serve", "status", "locks", "ids", "keys", "doctor", "demo", "check", "bench"):
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0
        assert f"coordlib {command}" in capsys.readouterr().out


def test_a_demo_of_no_time_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--seconds", "0"]) == 2
    assert "coordlib demo: --seconds" in capsys.readouterr().err


def doctor_environment(monkeypatch: pytest.MonkeyPatch, secret: str, endpoint: str, directory: Path) -> None:
    monkeypatch.setenv("COORDLIB_CLUSTER", "shop")
    monkeypatch.setenv("COORDLIB_NODE", "a")
    monkeypatch.setenv("COORDLIB_MEMBERS", f"a={endpoint},b={free_endpoint()}")
    monkeypatch.setenv("COORDLIB_SECRET", secret)
    monkeypatch.setenv("COORDLIB_DATA_DIR", str(directory))


def test_doctor_finds_a_sound_machine_sound(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It measures the disk, warns of an even number of members, and leaves nothing behind."""
    main(["keys", "new"])
    secret = capsys.readouterr().out.strip()
    doctor_environment(monkeypatch, secret, free_endpoint(), tmp_path / "not" / "yet")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for words in (
        "has CURVE",
        "secret: generated",
        "address is free",
        "fdatasync takes",
        "2 tolerate no more",
    ):
        assert words in out
    assert "FAIL" not in out
    assert list(tmp_path.iterdir()) == []


def test_doctor_names_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], solo: Members
) -> None:
    """A port that is taken, a directory that cannot be written, a weak secret; then settings that are none."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("coordlib.cli.doctor.tempfile.NamedTemporaryFile", _refuse)
    doctor_environment(monkeypatch, "only a passphrase this one", solo.endpoints["solo"], tmp_path)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    for words in ("FAIL listening", "FAIL data_dir", "warn secret", "warn member 'b'"):
        assert words in out
    monkeypatch.setenv("COORDLIB_NODE", "nobody")
    assert main(["doctor"]) == 1
    assert "FAIL settings" in capsys.readouterr().out


def _refuse(**_: object) -> object:
    raise PermissionError(13, "Permission denied")


def test_the_benchmarks_are_only_in_the_source_tree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(coordlib, "__file__", str(tmp_path / "coordlib" / "__init__.py"))
    assert main(["bench"]) == 2
    assert "make bench" in capsys.readouterr().err
