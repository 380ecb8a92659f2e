"""The library in front of libc (shim.c): built here, loaded into every application, steered from here while they run.

No production code knows of it: the calls of a running process fail, or answer another time, from one moment to
the next. Needs a C compiler.
"""

from __future__ import annotations

import mmap
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Final

__all__ = ["Shim", "ShimError", "build"]

SOURCE: Final = Path(__file__).with_name("shim.c")
_FIELDS: Final = (
    "wall_shift_ns",
    "sync_delay_ns",
    "sync_errno",
    "wall_reads",
    "syncs_slowed",
    "syncs_failed",
)
_LAYOUT: Final = struct.Struct(f"={len(_FIELDS)}q")
_NUMBER: Final = struct.Struct("=q")


class ShimError(Exception):
    """The library could not be built; the message says why."""


def build(directory: Path) -> Path:
    """
    Compile the library into the directory; returns its path.

    Raises:
        ShimError: There is no compiler, or it did not compile.
    """
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        raise ShimError("there is no C compiler (cc)")
    path = directory / "shim.so"
    command = [compiler, "-O1", "-Wall", "-shared", "-fPIC", "-o", str(path), str(SOURCE), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ShimError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return path


class Shim:
    """What is steered in one application, over all its incarnations. `close` lets go of it."""

    def __init__(self, library: Path, control: Path) -> None:
        self.library = library
        self._path = control
        control.write_bytes(bytes(_LAYOUT.size))
        with open(control, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), _LAYOUT.size)

    @property
    def environment(self) -> dict[str, str]:
        """What an application must be started with."""
        return {"LD_PRELOAD": str(self.library), "COORDLIB_NEMESIS_SHIM": str(self._path)}

    def get(self, field: str) -> int:
        (value,) = _NUMBER.unpack_from(self._map, _FIELDS.index(field) * _NUMBER.size)
        return int(value)

    def set(self, field: str, value: int) -> None:
        _NUMBER.pack_into(self._map, _FIELDS.index(field) * _NUMBER.size, value)

    def close(self) -> None:
        self._map.close()
