"""Whose disk a directory is: the `identity` file.

Disk::

    identity = 0  magic     8   "coordid\\n"
               8  version   4   format version of the whole directory, little-endian
              12  size      4   of the body
              16  checksum  4   crc32 of bytes 0..16 and the body
              20  body          canonical CBOR [node_id, disk_id, cluster_name, cluster_uuid, disks, backs, recorded,
                                  cut], disks and recorded = [[node_id, disk_id], ...], cut = [[term, index],
                                  [term, index]] or []; of the last three, those at the end that are empty are left out
"""

from __future__ import annotations

import struct
from typing import Any
from zlib import crc32

from coordlib import cbor
from coordlib.errors import StartError, StorageCorrupt
from coordlib.storage.base import CORRUPT_REMEDY, FORMAT_VERSION, DiskIdentity, LogCut
from coordlib.storage.files import FileSystem

__all__ = ["IDENTITY_NAME", "check_identity", "decode_identity", "read_identity", "write_identity"]

IDENTITY_NAME = "identity"
_TEMPORARY_NAME = "identity.tmp"
_SIZE_MAX = 1 << 20
_MAGIC = b"coordid\n"
_HEADER = struct.Struct("<8sII")
_CHECKSUM = struct.Struct("<I")


def encode_identity(identity: DiskIdentity) -> bytes:
    fields: list[object] = [
        identity.node_id,
        identity.disk_id,
        identity.cluster_name,
        identity.cluster_uuid,
        identity.disks,
        identity.backs,
        identity.recorded,
        identity.cut or (),
    ]
    while len(fields) > 5 and not fields[-1]:
        fields.pop()
    body = cbor.encode_canonical(fields)
    header = _HEADER.pack(_MAGIC, identity.format_version, len(body))
    return header + _CHECKSUM.pack(crc32(body, crc32(header))) + body


def decode_identity(data: bytes, path: str) -> DiskIdentity:
    """
    Raises:
        StartError: Written by a newer version.
        StorageCorrupt: Not what was written.
    """
    damaged = StorageCorrupt(
        f"{path} is damaged; {CORRUPT_REMEDY}",
        path=path,
    )
    if len(data) < 20:
        raise damaged
    magic, version, size = _HEADER.unpack_from(data)
    body = data[20:]
    # A newer format may lay out its body as it likes, but keeps this header and its checksum.
    if (
        magic != _MAGIC
        or size != len(body)
        or _CHECKSUM.unpack_from(data, 16)[0] != crc32(body, crc32(data[:16]))
    ):
        raise damaged
    if version > FORMAT_VERSION:
        raise StartError(
            f"{path} has disk format {version}, this coordlib reads up to {FORMAT_VERSION}: upgrade coordlib",
            path=path,
            format_version=version,
        )
    try:
        fields: list[Any] = cbor.decode(body)
        left_out: list[Any] = ["", (), ()]
        node_id, disk_id, cluster_name, cluster_uuid, disks, backs, recorded, cut = [
            *fields,
            *left_out[len(fields) - 5 :],
        ]
        reached, end = cut or ((0, 0), (0, 0))
        return DiskIdentity(
            version,
            node_id,
            disk_id,
            cluster_name,
            cluster_uuid,
            tuple((node, disk) for node, disk in disks),
            backs,
            tuple((node, disk) for node, disk in recorded),
            LogCut(_position(*reached), _position(*end)) if cut else None,
        )
    except (cbor.CBORError, ValueError, TypeError) as exc:
        raise damaged from exc


def _position(term: int, index: int) -> tuple[int, int]:
    return term, index


def read_identity(fs: FileSystem, directory: str) -> DiskIdentity:
    path = f"{directory}/{IDENTITY_NAME}"
    file = fs.open(path)
    try:
        return decode_identity(file.pread(_SIZE_MAX, 0), path)
    finally:
        file.close()


def write_identity(fs: FileSystem, directory: str, identity: DiskIdentity) -> None:
    """Replace the file durably and atomically. Raises OSError."""
    temporary = f"{directory}/{_TEMPORARY_NAME}"
    if _TEMPORARY_NAME in fs.names(directory):
        fs.unlink(temporary)
    file = fs.open(temporary, create=True)
    try:
        file.pwrite(encode_identity(identity), 0)
        file.datasync()
    finally:
        file.close()
    fs.rename(temporary, f"{directory}/{IDENTITY_NAME}")
    fs.sync_directory(directory)


def check_identity(identity: DiskIdentity, directory: str, node_id: str, cluster_name: str) -> None:
    """
    Raises:
        StartError: The directory is another node's or another cluster's.
    """
    if identity.cluster_name != cluster_name:
        raise StartError(
            f"{directory} belongs to cluster {identity.cluster_name!r}, not to {cluster_name!r}: "
            "correct the cluster's name or data_dir; nothing was changed",
            path=directory,
            found=identity.cluster_name,
        )
    if identity.node_id != node_id:
        raise StartError(
            f"{directory} belongs to node {identity.node_id!r}, not to {node_id!r}: "
            "correct the node's name or data_dir; nothing was changed",
            path=directory,
            found=identity.node_id,
        )
