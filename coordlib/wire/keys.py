"""From the cluster's secret to every key that is used: derivation only, nothing is sent or stored here.

Any holder of the secret can be any node of the cluster: the secret authenticates *the cluster*.

Wire: a secret becomes keys thus, so changing a label or a parameter parts old nodes from new ones::

    secret "coord1-" base64url(32 bytes)    ikm = the 32 bytes
    any other string, 16 characters or more ikm = scrypt(secret, n = 2^14, r = 8, p = 1, 32 bytes,
                                                         salt = SHA-256("coordlib 1 scrypt" | 0 | cluster))
    every key     HKDF-SHA256(ikm, salt = SHA-256("coordlib 1" | 0 | cluster),
                              info = "coordlib 1 " label, 32 bytes)
    labels        "curve server", "curve client"     X25519 private keys
                  "handshake mac"                    Mac0 key of HELLO and WELCOME
                  "handshake psk"                    enters every session's keys
                  "epoch id"                         first 4 bytes; public, names the secret
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from coordlib.errors import ConfigError, ForkedError
from coordlib.wire.cose import MACKey

__all__ = ["ClusterKeys", "CurveKeys", "EpochKeys", "generate_secret", "hkdf"]

SECRET_PREFIX: Final = "coord1-"
SECRET_SIZE: Final = 32
PASSPHRASE_CHARACTERS_MIN: Final = 16
SECRETS_MAX: Final = 8

# 16 MiB and some 50 ms, once at start. Some precedents: RFC 7914 §2 (interactive use), hashlib's examples.
_SCRYPT_N: Final = 2**14


def hkdf(ikm: bytes, *, salt: bytes, info: bytes, size: int) -> bytes:
    """HKDF-SHA256 (RFC 5869)."""
    return HKDF(algorithm=SHA256(), length=size, salt=salt, info=info).derive(ikm)


def generate_secret(random_bytes: Callable[[int], bytes]) -> str:
    """A new cluster secret. `random_bytes` is os.urandom or, in tests, something that repeats."""
    return SECRET_PREFIX + base64.urlsafe_b64encode(random_bytes(SECRET_SIZE)).rstrip(b"=").decode()


class CurveKeys(NamedTuple):
    """Two raw Curve25519 key pairs, in the order in which the transport's settings take them."""

    server_public: bytes
    server_secret: bytes
    client_public: bytes
    client_secret: bytes

    def __repr__(self) -> str:
        return (
            f"CurveKeys(server_public={self.server_public.hex()}, client_public={self.client_public.hex()})"
        )


class EpochKeys:
    """All keys that follow from one secret. An *epoch* is the time during which that secret is in use."""

    __slots__ = ("_psk", "curve", "epoch_id", "handshake_mac")

    def __init__(self, ikm: bytes, cluster: str) -> None:
        salt = hashlib.sha256(b"coordlib 1\0" + cluster.encode()).digest()

        def derive(label: str) -> bytes:
            return hkdf(ikm, salt=salt, info=f"coordlib 1 {label}".encode(), size=32)

        self.epoch_id: bytes = derive("epoch id")[:4]
        self.handshake_mac = MACKey(derive("handshake mac"))
        self._psk = bytearray(derive("handshake psk"))
        server, client = derive("curve server"), derive("curve client")
        self.curve = CurveKeys(_public_of(server), server, _public_of(client), client)

    @property
    def handshake_psk(self) -> bytes:
        return bytes(self._psk)

    def wipe(self) -> None:
        self._psk[:] = bytes(len(self._psk))
        self.handshake_mac = MACKey(b"")
        self.curve = CurveKeys(b"", b"", b"", b"")

    def __repr__(self) -> str:
        return f"EpochKeys(epoch_id={self.epoch_id.hex()})"


class ClusterKeys:
    """
    The keys of one cluster, newest epoch first: the first is used to begin, all are accepted.

    A secret is changed without stopping the cluster by giving every node `[new, old]`, one after the
    other, and then every node `[new]`. Meanwhile a node that still has `[old]` refuses the new epoch;
    whoever connects to it then falls back to an epoch that it accepts.
    """

    __slots__ = ("_is_wiped", "epochs")

    def __init__(self, epochs: Sequence[EpochKeys]) -> None:
        self.epochs: tuple[EpochKeys, ...] = tuple(epochs)
        self._is_wiped = False

    @classmethod
    def from_secrets(cls, secrets: Sequence[str | bytes], cluster_name: str) -> ClusterKeys:
        """
        Derive all keys. Some microseconds for a generated secret, some 50 ms for a passphrase.

        Raises:
            ConfigError: No secret, too many, one twice, a damaged generated secret, or a passphrase that
                is too short. The message never contains the secret.
        """
        if isinstance(secrets, str | bytes):
            secrets = [secrets]
        if not 1 <= len(secrets) <= SECRETS_MAX:
            raise ConfigError(
                f"secret: give one, or up to {SECRETS_MAX} while it is being changed, not {len(secrets)}; "
                "`coordlib keys new` prints a good one"
            )
        epochs = [EpochKeys(_key_material(secret, cluster_name), cluster_name) for secret in secrets]
        if len({epoch.epoch_id for epoch in epochs}) != len(epochs):
            raise ConfigError("secret: the same secret is given twice; leave one of them out")
        return cls(epochs)

    @property
    def epoch_ids(self) -> tuple[bytes, ...]:
        return tuple(epoch.epoch_id for epoch in self.epochs)

    @property
    def curve(self) -> tuple[CurveKeys, ...]:
        """For the transport: first to connect with and to accept, the others accepted too."""
        self._ensure_usable()
        return tuple(epoch.curve for epoch in self.epochs)

    def index_of(self, epoch_id: bytes) -> int | None:
        """Which of our epochs this is; None if it is not ours."""
        self._ensure_usable()
        for index, epoch in enumerate(self.epochs):
            if epoch.epoch_id == epoch_id:
                return index
        return None

    def wipe(self) -> None:
        """
        Forget the keys: in a forked child, which must not speak in its parent's name. Idempotent.

        Best effort: what Python or OpenSSL copied meanwhile stays in memory until it is reused.
        """
        for epoch in self.epochs:
            epoch.wipe()
        self._is_wiped = True

    def _ensure_usable(self) -> None:
        if self._is_wiped:
            raise ForkedError(
                "the keys were wiped in this process; make a new handle with coordlib.connect(...)"
            )

    def __repr__(self) -> str:
        return f"ClusterKeys(epochs={[epoch_id.hex() for epoch_id in self.epoch_ids]})"


def _key_material(secret: str | bytes, cluster_name: str) -> bytes:
    try:
        text = secret.decode() if isinstance(secret, bytes) else secret
        raw = text.strip().encode()  # a secret read from a file ends in a newline
    except UnicodeError:
        raise ConfigError("secret: not text; `coordlib keys new` prints a good one") from None
    if raw.startswith(SECRET_PREFIX.encode()):
        try:
            # urlsafe_b64decode skips characters it does not know: a damaged secret would become another one.
            encoded = raw[len(SECRET_PREFIX) :].translate(bytes.maketrans(b"-_", b"+/"))
            material = base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
        except binascii.Error:
            material = b""
        if len(material) != SECRET_SIZE:
            raise ConfigError(
                f"secret: begins with {SECRET_PREFIX!r} but is damaged (cut off when it was copied?); "
                "`coordlib keys new` prints a good one"
            )
        return material
    if len(raw.decode()) < PASSPHRASE_CHARACTERS_MIN:
        raise ConfigError(
            f"secret: a passphrase needs at least {PASSPHRASE_CHARACTERS_MIN} characters; "
            "better is a generated one: `coordlib keys new`"
        )
    salt = hashlib.sha256(b"coordlib 1 scrypt\0" + cluster_name.encode()).digest()
    return hashlib.scrypt(raw, salt=salt, n=_SCRYPT_N, r=8, p=1, dklen=32)


def _public_of(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
