"""Snapshots: taken while commands go on, the same bytes everywhere, restored completely or not at all."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from coordlib.cbor import encode
from coordlib.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from coordlib.machine import Limits, Machine, UnknownSnapshot, commands
from coordlib.machine.snapshots import PREAMBLE, SNAPSHOT_VERSION, Block, pack_block
from coordlib.machine.table import BUCKETS
from tests.machine.driver import Driver, restore, snapshot

FIXTURES = Path(__file__).parent / "fixtures"


def populated(seed: int = 1, limits: Limits | None = None) -> Driver:
    """A machine with something of every kind in it."""
    rng = random.Random(seed)
    driver = Driver(limits)
    sessions = [driver.open(f"worker-{number}", 5000 + number) for number in range(5)]
    driver.run(0, commands.record_disk("a", bytes(range(16))))
    driver.run(0, commands.checkpoint_sessions([(sessions[1], 1234)]))
    driver.run(0, commands.begin_epoch(2))
    for _ in range(400):
        disturb(driver, rng, sessions)
        driver.now_ms += rng.randrange(10)
    return driver


def disturb(driver: Driver, rng: random.Random, sessions: list[int]) -> None:
    """One more command of any kind."""
    session = rng.choice(sessions)
    name = b"map-%d" % rng.randrange(3)
    key = b"key-%d" % rng.randrange(200)
    lock = b"lock-%d" % rng.randrange(10)
    ids = b"ids-%d" % rng.randrange(2)
    mint_ms = driver.now_ms - rng.randrange(20)
    gtid = mint_ms.to_bytes(6) + session.to_bytes(8) + rng.randrange(2).to_bytes(2)
    branches = [("db", "a", b"%d" % number) for number in range(rng.randrange(3))]
    known = [row[0] for row in driver.ask(commands.query_tx_list(None, 50, True))[0]]
    operation = rng.choice(
        [
            commands.ids_lease(ids, (41, 12, 3, 1, 1, 1), rng.randrange(1, 200)),
            commands.ids_renew(ids, rng.randrange(8), rng.randrange(1, 50), 100),
            commands.ids_return(ids, rng.randrange(8), rng.randrange(1, 50), rng.randrange(4000)),
            commands.ids_skip(driver.now_ms + 10)
            if rng.random() < 0.05
            else commands.map_put(name, key, b"x"),
            commands.tx_decide(
                gtid,
                driver.now_ms + rng.randrange(-1, 9),
                participants=branches,
                conditions=[commands.map_is_at(name, 0)] if rng.random() < 0.5 else [],
                writes=[commands.put_key(name, key, b"t"), commands.delete_key(b"map-0", key)],
                releases=[(lock, rng.randrange(1, 100))],
            ),
            commands.tx_resolve(gtid),
            commands.tx_forget([(item, b"%d" % rng.randrange(3)) for item in known]),
            commands.tx_heuristic(gtid, b"0", rng.choice(["", "rolled back"]), "somebody"),
            commands.service_register(f"service-{rng.randrange(3)}", f"{rng.randrange(2)}"),
            commands.service_unregister(f"service-{rng.randrange(3)}"),
            commands.map_put(name, key, rng.randbytes(rng.randrange(50))),
            commands.map_delete(name, key),
            commands.map_update(name, [(b"key-%d" % rng.randrange(200), b"u") for _ in range(5)]),
            commands.acquire(lock),
            commands.release(lock, rng.randrange(1, 100)),
            commands.map_popitem(name),
            commands.map_clear(name) if rng.random() < 0.05 else commands.map_insert(name, key, b"i"),
        ]
    )
    acknowledged = max(0, driver.sequences.get(session, 0) - rng.randrange(1, 60))
    driver.apply(session, operation, acknowledged=acknowledged)


def test_a_restored_machine_is_the_machine() -> None:
    """Everything is in it: replies, queues, tokens, maps, members, time and limits."""
    limits = Limits(maps_max=17)
    driver = populated(limits=limits)
    other = restore(snapshot(driver.machine))
    other.check_invariants()
    assert driver.machine.digest() == other.digest()
    assert limits == other.limits
    assert driver.machine.members() == other.members()
    assert list(driver.machine.sessions.live()) == list(other.sessions.live())
    names = (
        "applied_index",
        "sessions",
        "replies_bytes",
        "locks",
        "acquisitions",
        "grants",
        "keys",
        "state_bytes",
        "id_generators",
        "id_workers",
        "tx_committed",
        "tx_pending",
        "tx_aborted",
        "tx_heuristics",
        "tx_horizon_ms",
        "services",
    )
    for name in names:
        assert driver.machine.counters[name] == other.counters[name]
    assert (driver.machine.log_time_ms, 2) == (other.log_time_ms, other.restore_epoch)


def test_the_bytes_do_not_depend_on_how_they_are_asked_for() -> None:
    """Nor on which member made them."""
    driver = populated()
    expected = snapshot(driver.machine, 1 << 20)
    assert expected == snapshot(driver.machine, 7)
    assert expected == snapshot(driver.replay(), 1000)
    assert expected == snapshot(restore(expected), 4096)


@pytest.mark.parametrize("seed", range(4))
def test_a_snapshot_is_of_the_moment_it_was_begun(seed: int) -> None:
    """Commands of every kind are applied between its slices, and other snapshots come and go."""
    driver = populated(seed)
    rng = random.Random(seed)
    expected = snapshot(driver.machine)
    source = driver.machine.begin_snapshot()
    sessions = [item.session for item in driver.machine.sessions.live()]
    parts = []
    while (data := source.next(rng.randrange(1, 600))) is not None:
        parts.append(data)
        for _ in range(rng.randrange(20)):
            disturb(driver, rng, sessions)
        if rng.random() < 0.05:
            driver.run(0, commands.expire_sessions([rng.choice(sessions)]))
            sessions.append(driver.open())
            snapshot(driver.machine)
        driver.machine.free_slice()
    source.close()
    assert expected == b"".join(parts)
    assert not driver.machine.sessions.table.views
    assert not driver.machine._ids.workers.views
    assert not driver.machine._transactions.outcomes.views
    assert not driver.machine._services.table.views
    # A member that was restored from it and is given the rest of the log agrees with all others.
    other = restore(expected)
    for index, data in driver.log:
        if index > other.applied_index:
            other.apply(index, 1, data)
    assert driver.machine.digest() == other.digest() == driver.replay().digest()


def test_a_snapshot_survives_a_restore_of_its_own_machine() -> None:
    """It goes on reading the state that was replaced."""
    driver = populated()
    expected = snapshot(driver.machine)
    source = driver.machine.begin_snapshot()
    first = source.next(1000)
    assert first is not None
    restore(snapshot(populated(7).machine), driver.machine)
    while driver.machine.free_slice():
        pass
    rest = []
    while (data := source.next(1000)) is not None:
        rest.append(data)
    source.close()
    assert expected == first + b"".join(rest)


def test_a_restore_replaces_the_state_in_one_step() -> None:
    """Until `finish` the old state answers; afterwards nothing of it is left but garbage to be freed."""
    data = snapshot(populated(1).machine)
    driver = populated(2)
    before = driver.machine.digest()
    sink = driver.machine.begin_restore()
    for begin in range(0, len(data), 100):
        sink.feed(data[begin : begin + 100])
        if begin % 5000 == 0:
            assert before == driver.machine.digest()
    sink.finish()
    assert data == snapshot(driver.machine)
    assert driver.machine.counters["garbage_buckets"] > 0
    while driver.machine.free_slice():
        pass
    assert driver.machine.counters["garbage_buckets"] == 0


def test_a_damaged_snapshot_leaves_the_state_as_it_was() -> None:
    """
    Cut at any place, or with any byte changed: an error or another valid state, never a mixture or a crash.
    """
    data = snapshot(populated(1).machine)[:3000] + snapshot(Driver().machine)[-20:]
    good = snapshot(Driver().machine)
    machine = populated(2).machine
    before = machine.digest()
    for cut in range(len(good)):
        sink = machine.begin_restore()
        with pytest.raises(RemoteProtocolError):
            sink.feed(good[:cut])
            sink.finish()
    rng = random.Random(3)
    for _ in range(400):
        damaged = bytearray(data)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        sink = machine.begin_restore()
        with pytest.raises((ProtocolError, UnknownSnapshot)):
            sink.feed(bytes(damaged))
            sink.finish()
    assert before == machine.digest()


def test_a_snapshot_of_a_newer_format_is_refused_with_the_remedy() -> None:
    """The node stops, with its state unchanged."""
    with pytest.raises(UnknownSnapshot) as caught:
        Machine().begin_restore().feed(b"CLSN\x00\x04")
    assert ("upgrade" in str(caught.value), 4) == (True, caught.value.version)


@pytest.mark.parametrize(
    "blocks",
    [
        [pack_block(Block.SESSIONS, [])],
        [pack_block(Block.END, 0)],
        [pack_block(Block.HEADER, 1, 2, [1, 2], 0, 0), pack_block(Block.END, 0)][1:],
        [snapshot(Machine())[len(PREAMBLE) :], pack_block(Block.END, 0)],
        [b"\xff\xff\xff\xff"],
        [b"\x00\x00\x00\x02" + encode([99])],
        [b"\x00\x00\x00\x01\x80"],
    ],
)
def test_blocks_out_of_place_are_refused(blocks: list[bytes]) -> None:
    """No header, no end, two ends, unknown kinds, absurd lengths."""
    sink = Machine().begin_restore()
    with pytest.raises(RemoteProtocolError):
        sink.feed(PREAMBLE + b"".join(blocks))
        sink.finish()


def test_sources_and_sinks_are_used_once() -> None:
    """After close, finish or an error."""
    machine = populated().machine
    source = machine.begin_snapshot()
    assert machine.counters["snapshots_open"] == 1
    source.close()
    source.close()
    assert machine.counters["snapshots_open"] == 0
    with pytest.raises(LocalProtocolError):
        source.next(1)
    sink = machine.begin_restore()
    sink.feed(snapshot(machine))
    sink.finish()
    with pytest.raises(LocalProtocolError):
        sink.finish()
    with pytest.raises(LocalProtocolError):
        sink.feed(b"")


@pytest.mark.parametrize("version", [1, SNAPSHOT_VERSION])
def test_every_format_is_still_read(version: int) -> None:
    """
    Disk: a log and its snapshot as each version wrote them.

    Replies, the texts of errors among them, are part of the state: changing one makes members of two versions
    differ. So do the defaults of limits that a snapshot is older than.
    """
    lines = [line.split() for line in (FIXTURES / f"format-{version}.txt").read_text().splitlines()]
    driver = Driver()
    for kind, *fields in lines:
        if kind == "entry":
            driver.machine.apply(int(fields[0]), 1, bytes.fromhex(fields[1]))
    stored = bytes.fromhex(lines[-1][1])
    assert stored.startswith(b"CLSN" + version.to_bytes(2))
    restored = restore(stored)
    restored.check_invariants()
    assert driver.machine.digest() == restored.digest()
    assert driver.machine.limits == restored.limits == Limits()
    if version == SNAPSHOT_VERSION:
        assert stored == snapshot(driver.machine)


def test_two_hundred_thousand_keys_are_taken_in_small_steps() -> None:
    """
    What one slice touches is bounded: a bucket or two, however many keys there are.

    Commands are applied in between, and the result is what it was at the beginning.
    """
    driver = Driver()
    session = driver.open()
    count = 200_000
    table = driver.machine._maps.begin_map(b"big", 1)
    for number in range(count):
        driver.machine._maps.load(table, b"key-%d" % number, bytes(24) + b"v")
    source = driver.machine.begin_snapshot()
    view = table.views[0]
    positions = [0]
    rng = random.Random(5)
    seen = 0
    while (data := source.next(64 * 1024)) is not None:
        seen += len(data)
        positions.append(view._position)
        for _ in range(20):
            number = rng.randrange(count)
            driver.run(
                session,
                commands.map_put(b"big", b"key-%d" % number, b"new"),
                acknowledged=max(0, driver.sequences.get(session, 0) - 5),
            )
    assert positions[-1] == BUCKETS
    assert max(later - earlier for earlier, later in itertools.pairwise(positions)) <= 4
    assert seen > count * 30
    assert sum(map(len, view._old.values())) == 0
    source.close()
    driver.run(session, commands.map_clear(b"big"))
    assert driver.machine.counters["garbage_buckets"] >= BUCKETS
