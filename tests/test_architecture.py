"""The import arrows, and the purity of the pure parts, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "coordlib"

# Every layer may import itself and what its entry names. What is not listed here fails the test.
BASE = {"errors", "types", "cbor"}
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "types": set(),
    "cbor": {"errors"},
    "config": {"errors"},
    "ids": {"errors"},
    "raft": BASE,
    "machine": BASE,
    "wire": BASE | {"raft"},
    "storage": BASE | {"raft", "wire"},
    "transport": {"errors"},
    "node": BASE | {"config", "raft", "machine", "wire", "storage", "transport"},
    "txn": BASE | {"machine", "wire", "node"},
    "api": BASE | {"config", "machine", "wire", "storage", "transport", "node", "ids", "txn"},
    "cli": BASE
    | {"config", "machine", "wire", "storage", "transport", "node", "txn", "api", "ids", "testing", "<top>"},
    "testing": BASE
    | {"config", "raft", "machine", "wire", "storage", "transport", "node", "txn", "api", "ids", "<top>"},
    "<top>": {"api", "errors", "ids", "types"},
}

PURE = [
    PACKAGE / "raft",
    PACKAGE / "machine",
    PACKAGE / "wire",
    *(
        PACKAGE / "node" / f"{name}.py"
        for name in (
            "kernel",
            "client",
            "calls",
            "session",
            "service",
            "peers",
            "transfer",
            "logtime",
            "effects",
            "links",
        )
    ),
    *(
        PACKAGE / "txn" / f"{name}.py"
        for name in (
            "branches",
            "commit",
            "gtid",
            "members",
            "participant",
            "recovery",
            "service",
            "transaction",
        )
    ),
]
IMPURE_MODULES = {
    *(
        "time",
        "datetime",
        "random",
        "secrets",
        "uuid",
        "os",
        "socket",
        "select",
        "selectors",
        "threading",
        "asyncio",
    ),
    *(
        "subprocess",
        "multiprocessing",
        "sqlite3",
        "zmq",
        "signal",
        "tempfile",
        "pathlib",
        "shutil",
        "queue",
        "concurrent",
    ),
}


def _layer(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "<top>"


def _sources(folder: Path) -> list[Path]:
    return [folder] if folder.is_file() else sorted(folder.rglob("*.py"))


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            if module == "coordlib":
                # `from coordlib import x`: x is a module of ours, or a public name of the package
                yield from (
                    f"coordlib.{a.name}"
                    if (PACKAGE / a.name).exists() or (PACKAGE / f"{a.name}.py").exists()
                    else "coordlib"
                    for a in node.names
                )
            else:
                yield module


def test_imports_follow_the_arrows() -> None:
    """No layer imports one to its right; siblings such as raft and machine do not know each other."""
    wrong = []
    for path in _sources(PACKAGE):
        relative = path.relative_to(ROOT).with_suffix("")
        layer = relative.parts[1] if len(relative.parts) > 1 else "<top>"
        if layer in ("__init__", "__main__"):
            layer = "<top>" if layer == "__init__" else "cli"
        allowed = ARROWS[layer] | {layer}
        for module in _imports(path):
            if module.split(".")[0] == "coordlib" and _layer(module) not in allowed:
                wrong.append(f"{relative}: imports {module}")
    assert wrong == []


@pytest.mark.parametrize("folder", PURE, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_pure_parts_touch_no_clock_randomness_io_or_threads(folder: Path) -> None:
    """They are given all of it, so that the simulator can run exactly them."""
    wrong = []
    for path in _sources(folder):
        wrong += [
            f"{path.relative_to(ROOT)}: {m}" for m in _imports(path) if m.split(".")[0] in IMPURE_MODULES
        ]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("open", "print", "input")
            ):
                wrong.append(f"{path.relative_to(ROOT)}: {node.func.id}()")
    assert wrong == []


def test_transports_import_only_the_contract() -> None:
    """They are laid out as a third party's would be."""
    allowed = {"coordlib.transport.base", "coordlib.errors"}
    for path in _sources(ROOT / "transports"):
        found = {m for m in _imports(path) if m.split(".")[0] == "coordlib"}
        assert found <= allowed, path


def test_kinds_of_state_do_not_import_each_other() -> None:
    """`machine/__init__` alone composes them."""
    kinds = {"kv", "locks", "sessions", "members", "ids", "transactions", "services"}
    for kind in kinds:
        found = {
            m.rsplit(".", 1)[-1]
            for m in _imports(PACKAGE / "machine" / f"{kind}.py")
            if m.startswith("coordlib.machine.")
        }
        assert not found & (kinds - {kind}), kind


def test_every_file_fits_into_the_head() -> None:
    """Files over 1000 lines tell more than one story."""
    long = {
        str(p.relative_to(ROOT)): n
        for p in [*_sources(PACKAGE), *_sources(ROOT / "transports")]
        if (n := len(p.read_text().splitlines())) > 1000
    }
    assert long == {}
