"""What a peer can get wrong below the messages: one class for each line of the bad-input table.

Each has its own `code`, under which the receiver counts it. All are ProtocolErrors: the input is
dropped, the connection lives on, and nothing here ever ends a loop.
"""

from __future__ import annotations

from coordlib.errors import AuthenticationError, RemoteProtocolError

__all__ = [
    "MalformedFrame",
    "MalformedMessage",
    "ReplayedFrame",
    "SealBroken",
    "UnknownSession",
    "UnsupportedVersion",
    "WrongCluster",
    "WrongPeer",
    "WrongSecret",
]


class MalformedFrame(RemoteProtocolError):
    """Not laid out as a frame of ours; dropped before any cryptography."""

    code = "malformed"


class MalformedMessage(RemoteProtocolError):
    """An *authenticated* peer wrote what no correct node writes: a bug, or a compromised node. Log loudly."""

    code = "malformed-authenticated"


class UnsupportedVersion(RemoteProtocolError):
    """The frame says a wire version that we do not speak, and its sender has been told already."""

    code = "unsupported-version"


class UnknownSession(RemoteProtocolError):
    """Sealed for a session that we do not have (any more), and its sender has been told already."""

    code = "unknown-session"


class ReplayedFrame(RemoteProtocolError):
    """Authentic, but received before, or older than the replay window reaches."""

    code = "replayed"


class SealBroken(AuthenticationError):
    """The seal does not open: tampered, or made for another cluster, receiver or incarnation."""

    code = "auth-failed"


class WrongSecret(AuthenticationError):
    """The other side uses a cluster secret that we do not accept, or accepts none of ours."""

    code = "wrong-secret"


class WrongCluster(AuthenticationError):
    """The other side belongs to a cluster of another name."""

    code = "wrong-cluster"


class WrongPeer(AuthenticationError):
    """Proved the cluster's secret, but is not whom we asked for, or did not ask for us."""

    code = "wrong-peer"
