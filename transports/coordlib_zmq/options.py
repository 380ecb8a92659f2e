"""Settings into socket options: what libzmq is told, and what it would misunderstand."""

from __future__ import annotations

from typing import Final

import zmq

from coordlib.errors import ConfigError
from coordlib.transport.base import TransportKeys, TransportSettings
from coordlib_zmq.zap import DOMAIN

__all__ = ["BACKLOG", "WIRE_OVERHEAD", "check", "dress_dealer", "dress_router"]

BACKLOG: Final = 512

# A frame on the wire under CURVE: at most 9 bytes of ZMTP header, 33 of MESSAGE command. libzmq
# compares the whole with MAXMSGSIZE and cuts the connection without telling us why, so its limit is
# a little above ours: what is in between is delivered, and counted by us.
WIRE_OVERHEAD: Final = 42
_OVERSIZE_SLACK: Final = 64 * 1024

_KEY_SIZE: Final = 32


def dress_router(socket: zmq.Socket[bytes], settings: TransportSettings) -> None:
    """Set every option of an accepting socket but its key. All are read at bind, so this comes before."""
    _dress(socket, settings, settings.control_queue_frames_max)
    for option, value in (
        (zmq.ROUTER_MANDATORY, 1),  # a reply to nobody is refused, not swallowed
        (zmq.ROUTER_HANDOVER, 0),
        (zmq.BACKLOG, BACKLOG),
        (zmq.CURVE_SERVER, 1),
        (zmq.ZAP_ENFORCE_DOMAIN, 1),
    ):
        socket.setsockopt(option, value)
    socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)


def dress_dealer(
    socket: zmq.Socket[bytes],
    settings: TransportSettings,
    keys: TransportKeys,
    *,
    queue_frames_max: int,
    is_ipv6: bool,
) -> None:
    """Set every option of a connecting socket. All are read at connect, so this comes before."""
    _dress(socket, settings, queue_frames_max)
    for option, value in (
        (zmq.IMMEDIATE, 1),  # nothing is queued for a peer that is not there
        (zmq.RECONNECT_IVL, settings.reconnect_interval_ms),
        (zmq.RECONNECT_IVL_MAX, settings.reconnect_interval_ms_max),
        # Where packets vanish the system would wait for minutes, well after the network has healed.
        (zmq.CONNECT_TIMEOUT, max(settings.reconnect_interval_ms_max, 1000)),
        (zmq.IPV6, int(is_ipv6)),
    ):
        socket.setsockopt(option, value)
    socket.setsockopt(zmq.CURVE_SERVERKEY, keys.server_public)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.client_public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.client_secret)


def _dress(socket: zmq.Socket[bytes], settings: TransportSettings, queue_frames_max: int) -> None:
    for option, value in (
        (zmq.LINGER, 0),
        (zmq.SNDHWM, queue_frames_max),
        (zmq.RCVHWM, settings.control_queue_frames_max),
        (zmq.MAXMSGSIZE, settings.frame_size_bytes_max + _OVERSIZE_SLACK),
        (zmq.HANDSHAKE_IVL, settings.handshake_timeout_ms),
        (zmq.HEARTBEAT_IVL, settings.heartbeat_interval_ms),
        (zmq.HEARTBEAT_TIMEOUT, settings.heartbeat_timeout_ms),
        (zmq.HEARTBEAT_TTL, settings.heartbeat_timeout_ms),
        (zmq.TCP_KEEPALIVE, 1),
        (zmq.TCP_KEEPALIVE_IDLE, 10),
        (zmq.TCP_KEEPALIVE_INTVL, 5),
        (zmq.TCP_KEEPALIVE_CNT, 3),
    ):
        socket.setsockopt(option, value)


def check(settings: TransportSettings) -> None:
    """
    Refuse settings that libzmq would take without a word, or that leave a door open.

    Raises:
        ConfigError: Naming the setting.
    """
    if not settings.keys:
        raise ConfigError(
            "the zmq transport needs keys: give the cluster a secret (`coordlib keys new` makes one)"
        )
    for keys in settings.keys:
        for key in (keys.server_public, keys.server_secret, keys.client_public, keys.client_secret):
            if len(key) != _KEY_SIZE:
                raise ConfigError(f"a key has {_KEY_SIZE} bytes, not {len(key)}")
    for name in (
        "frame_size_bytes_max",
        "handshake_timeout_ms",
        "heartbeat_interval_ms",
        "heartbeat_timeout_ms",
        "reconnect_interval_ms",
        "reconnect_interval_ms_max",
        "control_queue_frames_max",
        "bulk_queue_frames_max",
    ):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name} is {getattr(settings, name)}; it must be at least 1")
    if not zmq.has("curve"):
        raise ConfigError(
            "this build of libzmq has no CURVE; install pyzmq from its wheel (`pip install pyzmq`)"
        )
