"""`coordlib ids`: read an id, mint some, and make a cluster that was restored from a back-up mint beyond the original.

What is read without --name, and minted with --worker, asks nobody.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from coordlib.api.cluster import Cluster
from coordlib.api.ids import WINDOW_MS_MAX
from coordlib.cli.settings import client_settings
from coordlib.errors import KeyMissing, UsageError
from coordlib.ids import (
    DEFAULT,
    LAYOUTS,
    Layout,
    from_base32,
    from_base62,
    from_hex,
    inspect,
    standalone,
    to_base32,
    to_base62,
    to_hex,
)
from coordlib.machine import commands
from coordlib.node.clock import monotonic_ms, wall_ms
from coordlib.node.driver import ClientDriver
from coordlib.node.operations import OpGen, Step
from coordlib.wire.messages import RequestKind

__all__ = ["FORMS", "run", "time_ms"]

PAGE: Final = 500
BLOCK: Final = 1000
ROUNDING_MS: Final = 60_000
"""Windows begin and end at whole units of their layout, which have 10 seconds at most."""
_UNIX: Final = datetime(1970, 1, 1, tzinfo=UTC)


def _from_decimal(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise UsageError(f"{text!r} is no number: give --form if it is in another form than decimal")
    return int(text)


FORMS: Final[dict[str, tuple[Callable[[str], int], Callable[[int], str]]]] = {
    "decimal": (_from_decimal, str),
    "base32": (from_base32, to_base32),
    "base62": (from_base62, to_base62),
    "hex": (from_hex, to_hex),
}
"""How ids are read and written, by name."""


def run(arguments: argparse.Namespace) -> int:
    action: Callable[[argparse.Namespace], int] = {"inspect": _inspect, "mint": _mint, "skip": _skip}[
        arguments.action
    ]
    return action(arguments)


def _inspect(arguments: argparse.Namespace) -> int:
    number = FORMS[arguments.form][0](arguments.id)
    if arguments.name is not None and arguments.layout is not None:
        raise UsageError("--layout is for ids that no cluster is asked about: leave it out, or --name")
    if arguments.name is None:
        print(inspect(number, _preset(arguments) or DEFAULT))
        return 0
    with _cluster(arguments) as cluster:
        layout = _known_layout(cluster, arguments.name)
        if layout is None:
            raise KeyMissing(f"the cluster has no ids of the name {arguments.name!r}")
        print(cluster.ids(arguments.name, layout=layout).inspect(number))
    return 0


def _mint(arguments: argparse.Namespace) -> int:
    if arguments.count < 0:
        raise UsageError("-n is 0 or more")
    write = FORMS[arguments.form][1]
    if arguments.worker is not None:
        if arguments.name is not None:
            raise UsageError("--worker mints without a cluster, and --name with one: leave one of them out")
        alone = standalone(worker=arguments.worker, layout=_preset(arguments) or DEFAULT)
        _print(_blocks(alone.mint_many, alone.layout, arguments.count), write)
        return 0
    name = "default" if arguments.name is None else arguments.name
    with _cluster(arguments) as cluster:
        ids = cluster.ids(name, layout=_preset(arguments) or _known_layout(cluster, name))
        _print(_blocks(ids.mint_many, ids.layout, arguments.count), write)
    return 0


def _blocks(mint_many: Callable[[int], Sequence[int]], layout: Layout, count: int) -> Iterator[Sequence[int]]:
    size = min(BLOCK, layout.sequences)
    for done in range(0, count, size):
        yield mint_many(min(size, count - done))


def _print(blocks: Iterator[Sequence[int]], write: Callable[[int], str]) -> None:
    for block in blocks:
        sys.stdout.write("".join([f"{write(number)}\n" for number in block]))


def _skip(arguments: argparse.Namespace) -> int:
    if not arguments.original_is_stopped:
        raise UsageError(
            "after a restore from back-up, this ends all leases of ids and lets no window begin within what the "
            "original can have granted. It cannot know of an original that still runs, which would go on to mint the "
            "same ids. Make sure that none does, its applications included; then repeat this with --original-is-stopped"
        )
    not_before_ms = 0 if arguments.not_before is None else time_ms(arguments.not_before)
    with _cluster(arguments) as cluster:
        timeout_ms = cluster._request_timeout_ms
        log_time_ms, ahead_ms = cluster._run(_times_gen(timeout_ms))
        newest_ms = max(wall_ms(), not_before_ms, log_time_ms)
        floor_ms, is_raised = cluster._run(
            _skip_gen(newest_ms + ahead_ms + WINDOW_MS_MAX + ROUNDING_MS, timeout_ms)
        )
    if not is_raised:
        print(f"nothing to do: no window begins before {_shown(floor_ms)} already")
        return 0
    print(
        f"no window of any generator begins before {_shown(floor_ms)}; all leases are ended. "
        "Applications may mint now: restart those that have minted since the restore"
    )
    return 0


def time_ms(text: str) -> int:
    """
    Milliseconds since 1970, from such a number or from a time as `coordlib ids inspect` shows it.

    Raises:
        UsageError: It is neither.
    """
    if text.isascii() and text.isdigit():
        return int(text)
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        time = None
    if time is None or time.tzinfo is None or time < _UNIX:
        raise UsageError(
            f"--not-before is milliseconds since 1970, or a time like 2026-01-31T23:59:59.999Z; got {text!r}"
        )
    return (time - _UNIX) // timedelta(milliseconds=1) + 1  # a part of a millisecond belongs to it


def _skip_gen(floor_ms: int, timeout_ms: int) -> OpGen[tuple[int, bool]]:
    step = Step(RequestKind.COMMAND, commands.ids_skip(floor_ms), monotonic_ms() + timeout_ms)
    floor_ms, is_raised = commands.decode_reply((yield step))
    return floor_ms, is_raised


def _times_gen(timeout_ms: int) -> OpGen[tuple[int, int]]:
    """The latest time that any generator is at, in ms since 1970; and how far leases may be ahead of it."""
    latest = 0
    after: bytes | None = None
    while True:
        reply = yield _query(commands.query_ids_list(after, PAGE), timeout_ms)
        page, is_more, ahead_ms = commands.decode_reply(reply)
        for name, _layout, _workers in page:
            reply = yield _query(commands.query_ids_info(name), timeout_ms)
            fields, _, _, _, now_unit, _ = commands.decode_reply(reply)
            latest = max(latest, fields[4] + now_unit * fields[3])
        if not is_more or not page:
            return latest, ahead_ms
        after = page[-1][0]


def _known_layout(cluster: Cluster, name: str) -> Layout | None:
    """As the cluster has it; a preset if it is one, so that it has its name. None: it does not know the name."""

    def ask() -> OpGen[Any]:
        reply = yield _query(commands.query_ids_info(name.encode()), cluster._request_timeout_ms)
        return commands.decode_reply(reply)[0]

    fields = cluster._run(ask())
    if fields is None:
        return None
    time_bits, sequence_bits, worker_bits, unit_ms, epoch_ms, worker_is_lowest = fields
    layout = Layout(
        time_bits=time_bits,
        sequence_bits=sequence_bits,
        worker_bits=worker_bits,
        unit_ms=unit_ms,
        epoch_ms=epoch_ms,
        worker_is_lowest=bool(worker_is_lowest),
    )
    for preset in LAYOUTS.values():
        if _replicated(preset) == _replicated(layout):
            return preset
    return layout


def _replicated(layout: Layout) -> tuple[object, ...]:
    return (
        layout.time_bits,
        layout.sequence_bits,
        layout.worker_bits,
        layout.unit_ms,
        layout.epoch,
        layout.worker_is_lowest,
    )


def _query(body: bytes, timeout_ms: int) -> Step:
    return Step(RequestKind.QUERY, body, monotonic_ms() + timeout_ms)


def _preset(arguments: argparse.Namespace) -> Layout | None:
    return None if arguments.layout is None else LAYOUTS[arguments.layout]


def _cluster(arguments: argparse.Namespace) -> Cluster:
    settings = client_settings(arguments, f"ids-{os.getpid()}")
    return Cluster._of(lambda: ClientDriver(settings), settings.timing)


def _shown(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="seconds")
