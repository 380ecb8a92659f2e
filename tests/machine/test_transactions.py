"""Decisions of transactions: one outcome for each, for ever, all of it or nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from coordlib.cbor import encode
from coordlib.errors import ConditionFailed, QuotaExceeded, RemoteProtocolError, UsageError
from coordlib.machine import Limits, LockGranted, UnknownCommand, commands
from coordlib.machine.commands import OpCode, TxStatus
from coordlib.machine.limits import ENTRY_OVERHEAD_BYTES
from coordlib.machine.transactions import HEURISTICS_MAX
from tests.machine.driver import Driver, restore, snapshot

NONE, COMMITTED, ABORTED, UNKNOWN = TxStatus
LIFETIME_MS = Limits().tx_lifetime_ms
RETENTION_MS = Limits().tx_retention_ms
START_MS = 10_000_000
X = ("db", "a", b"x")
Y = ("files", "b", b"y")


def ready(limits: Limits | None = None) -> tuple[Driver, int]:
    driver = Driver(limits)
    driver.now_ms = START_MS
    return driver, driver.open("initiator")


def minted(mint_ms: int = START_MS, session: int = 1, counter: int = 0) -> bytes:
    return mint_ms.to_bytes(6) + session.to_bytes(8) + counter.to_bytes(2)


def decide(driver: Driver, session: int, *args: Any, **how: Any) -> list[Any]:
    """Status, reason, revision, branch, failed condition."""
    return driver.run(session, commands.tx_decide(*args, **how))


def state(driver: Driver, gtid: bytes) -> list[Any]:
    return driver.ask(commands.query_tx_state(gtid))


def content(driver: Driver, name: bytes = b"m") -> dict[bytes, bytes]:
    _, _, flat = driver.ask(commands.query_range(name))
    return dict(zip(flat[::2], flat[1::2], strict=True))


# --- deciding ---------------------------------------------------------------------------------------------


def test_a_transaction_is_committed_with_all_its_writes_at_one_revision() -> None:
    """Writes to several maps, of the last of those to one key, and its participants are pending."""
    driver, session = ready()
    driver.run(session, commands.map_put(b"m", b"old", b"1"))
    gtid = minted()
    writes = [
        commands.put_key(b"m", b"k", b"v"),
        commands.delete_key(b"m", b"old"),
        commands.put_key(b"n", b"k", b"first"),
        commands.put_key(b"n", b"k", b"last"),
        commands.put_key(b"n", b"gone", b""),
        commands.delete_key(b"n", b"gone"),
    ]
    assert decide(driver, session, gtid, participants=[X, Y], writes=writes) == [
        COMMITTED,
        "",
        driver.index,
        0,
        -1,
    ]
    assert (content(driver), content(driver, b"n")) == ({b"k": b"v"}, {b"k": b"last"})
    for name in (b"m", b"n"):
        value = driver.ask(commands.query_get_meta(name, b"k"))
        assert value[1:] == [driver.index, driver.index, 1]
    assert state(driver, gtid) == [
        COMMITTED,
        "",
        driver.index,
        True,
        START_MS,
        [list(X), list(Y)],
        [],
    ]
    driver.machine.check_invariants()


def test_the_first_decision_is_the_last_whoever_asks_again() -> None:
    """A repeated DECIDE, of another session or with other contents, gets the first one's answer."""
    driver, session = ready()
    other = driver.open("recoverer")
    gtid, late = minted(counter=1), minted(counter=2)
    first = decide(driver, session, gtid, participants=[X], writes=[commands.put_key(b"m", b"k", b"v")])
    again = decide(driver, other, gtid, 0, conditions=[commands.map_is_at(b"m", 0)])
    assert first == again
    assert driver.run(other, commands.tx_resolve(gtid)) == first[:3]
    resolved = driver.run(other, commands.tx_resolve(late))
    assert resolved == [ABORTED, "resolved", driver.index]
    assert decide(driver, session, late, writes=[commands.delete_key(b"m", b"k")]) == [*resolved, 0, -1]
    assert content(driver) == {b"k": b"v"}


def test_an_abort_is_remembered_with_its_reason() -> None:
    """An initiator that lost the answer and asks again, later and in time, is not committed either."""
    driver, session = ready()
    gtid = minted()
    conflict = decide(driver, session, gtid, conditions=[commands.key_is_at(b"m", b"k", 7)])
    assert conflict == [ABORTED, "conflict", driver.index, 0, 0]
    assert decide(driver, session, gtid) == conflict
    assert state(driver, gtid)[:3] == conflict[:3]


@pytest.mark.parametrize("deadline_ms", [START_MS - 1, 0])
def test_after_its_deadline_nothing_is_committed(deadline_ms: int) -> None:
    """Log time decides, that of the entry itself."""
    driver, session = ready()
    writes = [commands.put_key(b"m", b"k", b"v")]
    assert decide(driver, session, minted(counter=1), START_MS, writes=writes)[0] == COMMITTED
    assert decide(driver, session, minted(counter=2), deadline_ms, writes=writes)[:2] == [ABORTED, "deadline"]
    assert decide(driver, session, b"", deadline_ms, writes=writes)[:2] == [ABORTED, "deadline"]


def test_no_transaction_is_committed_beyond_the_longest_life_whatever_its_deadline_says() -> None:
    """Which is why no record of an abort is needed beyond it."""
    driver, session = ready()
    first, second = minted(counter=1), minted(counter=2)
    driver.now_ms += LIFETIME_MS
    assert decide(driver, session, first)[0] == COMMITTED
    driver.now_ms += 1
    assert decide(driver, session, second) == [ABORTED, "deadline", 0, 0, -1]
    assert driver.run(session, commands.tx_resolve(second)) == [ABORTED, "deadline", 0]
    assert state(driver, second)[:3] == [ABORTED, "deadline", 0]
    assert driver.machine.counters["tx_aborted"] == 0


def test_what_is_minted_far_ahead_of_log_time_is_not_decided_yet() -> None:
    """Its record would have to be kept for as long; when log_time has come nearer, it is decided as any other."""
    driver, session = ready()
    gtid = minted(START_MS + LIFETIME_MS + 1)
    for operation in (commands.tx_decide(gtid), commands.tx_resolve(gtid)):
        with pytest.raises(ConditionFailed):
            driver.run(session, operation)
    assert state(driver, gtid)[0] == NONE
    assert driver.machine.counters["tx_aborted"] == 0
    driver.now_ms += 1
    assert driver.run(session, commands.tx_resolve(gtid))[0] == ABORTED
    assert decide(driver, session, gtid)[0] == ABORTED


def test_a_guard_that_does_not_hold_aborts() -> None:
    """The lock is somebody else's, or nobody's; nothing of it is carried out."""
    driver, session = ready()
    _, token, _ = driver.run(session, commands.acquire(b"lock"))
    writes = [commands.put_key(b"m", b"k", b"v")]
    assert decide(driver, session, minted(), guards=[(b"lock", token + 1)], writes=writes)[:2] == [
        ABORTED,
        "lock-lost",
    ]
    assert (
        decide(driver, session, b"", guards=[(b"lock", token), (b"none", 1)], writes=writes)[1] == "lock-lost"
    )
    assert content(driver) == {}
    assert decide(driver, session, b"", guards=[(b"lock", token)], writes=writes)[0] == COMMITTED


def test_locks_are_released_by_the_decision_itself() -> None:
    """The next waiter has it at once; a lock of another session, or none, is let be."""
    driver, session = ready()
    other = driver.open("waiter")
    _, token, _ = driver.run(session, commands.acquire(b"mine"))
    mine = driver.last(session)
    driver.run(other, commands.acquire(b"mine"))
    driver.run(other, commands.acquire(b"theirs"))
    releases = [(b"mine", mine), (b"theirs", driver.last(other)), (b"none", 1)]
    applied = driver.apply(
        session, commands.tx_decide(minted(), guards=[(b"mine", token)], releases=releases)
    )
    assert list(applied.effects) == [LockGranted(other, 1, b"mine", token + 2)]
    assert driver.ask(commands.query_lock(b"theirs"))[0][0] == other
    again = driver.apply(session, commands.tx_decide(minted(), releases=[(b"theirs", 2)]))
    assert again.effects == ()


def test_an_aborted_transaction_releases_nothing() -> None:
    """What is to happen to its locks is for whoever holds them to say."""
    driver, session = ready()
    driver.run(session, commands.acquire(b"lock"))
    release = [(b"lock", driver.last(session))]
    applied = driver.apply(session, commands.tx_decide(minted(), START_MS - 1, releases=release))
    assert applied.effects == ()
    assert driver.ask(commands.query_lock(b"lock"))[0][0] == session


def test_an_acquisition_that_comes_after_its_release_is_refused() -> None:
    """As with the command of its own: nobody would ever release it again."""
    driver, session = ready()
    decide(driver, session, b"", releases=[(b"lock", 1)])
    driver.sequences[session] = 5
    decide(driver, session, b"", releases=[(b"lock", 3)])
    late = driver.apply(session, commands.acquire(b"lock"), sequence=3)
    error = commands.error_reply(late.reply)
    assert error is not None and error.code == "stale-request"
    assert driver.ask(commands.query_lock(b"lock"))[0] is None


# --- conditions -------------------------------------------------------------------------------------------


def test_every_kind_of_condition_holds_and_fails() -> None:
    """At a revision, of a whole map, by value; of what is there and of what is not. The failed one is named."""
    driver, session = ready()
    (created,) = driver.run(session, commands.map_put(b"m", b"k", b"v"))
    (changed,) = driver.run(session, commands.map_put(b"m", b"other", b"w"))
    true = [
        commands.key_is_at(b"m", b"k", created),
        commands.key_is_at(b"m", b"none", 0),
        commands.key_is_at(b"none", b"k", 0),
        commands.map_is_at(b"m", changed),
        commands.map_is_at(b"none", 0),
        commands.key_equals(b"m", b"k", b"v"),
        commands.key_equals(b"m", b"none", None),
        commands.key_equals(b"none", b"k", None),
    ]
    false = [
        commands.key_is_at(b"m", b"k", 0),
        commands.key_is_at(b"m", b"k", changed),
        commands.key_is_at(b"m", b"none", created),
        commands.map_is_at(b"m", created),
        commands.map_is_at(b"m", 0),
        commands.map_is_at(b"none", 1),
        commands.key_equals(b"m", b"k", b""),
        commands.key_equals(b"m", b"k", None),
        commands.key_equals(b"m", b"none", b""),
    ]
    assert decide(driver, session, b"", conditions=true)[0] == COMMITTED
    for condition in false:
        expected = [ABORTED, "conflict", driver.index + 1, 0, len(true)]
        assert expected == decide(driver, session, b"", conditions=[*true, condition])


def test_a_map_that_was_emptied_and_filled_again_has_changed() -> None:
    """Its revision is that of a new change, though it holds the same."""
    driver, session = ready()
    (revision,) = driver.run(session, commands.map_put(b"m", b"k", b"v"))
    driver.run(session, commands.map_clear(b"m"))
    driver.run(session, commands.map_put(b"m", b"k", b"v"))
    assert decide(driver, session, b"", conditions=[commands.map_is_at(b"m", revision)])[0] == ABORTED
    assert decide(driver, session, b"", conditions=[commands.key_is_at(b"m", b"k", revision)])[0] == ABORTED


def test_otherwise_is_carried_out_when_a_condition_fails() -> None:
    """It is a commit: the reply says which branch it was, and what failed."""
    driver, session = ready()
    gtid = minted()
    decided = decide(
        driver,
        session,
        gtid,
        participants=[X],
        conditions=[commands.map_is_at(b"m", 0), commands.key_equals(b"m", b"k", b"v")],
        writes=[commands.put_key(b"m", b"then", b"")],
        otherwise=[commands.put_key(b"m", b"else", b"")],
    )
    assert decided == [COMMITTED, "", driver.index, 1, 1]
    assert decide(driver, session, gtid) == decided
    assert content(driver) == {b"else": b""}
    assert decide(driver, session, b"", conditions=[commands.map_is_at(b"n", 1)], otherwise=[])[3] == 1


def test_a_batch_without_a_gtid_leaves_no_record() -> None:
    """The reply of its request is what makes it exactly once."""
    driver, session = ready()
    operation = commands.tx_decide(b"", writes=[commands.put_key(b"m", b"k", b"v")])
    first = driver.apply(session, operation)
    assert first.reply == driver.apply(session, operation, sequence=driver.last(session)).reply
    decide(driver, session, b"", 0)
    assert driver.ask(commands.query_tx_list()) == [[], False]


# --- what is refused --------------------------------------------------------------------------------------


def fill(driver: Driver, session: int, count: int) -> None:
    for number in range(count):
        assert decide(driver, session, minted(counter=100 + number), participants=[X])[0] == COMMITTED


def test_more_than_fits_is_refused_before_append_and_aborted_when_applied() -> None:
    """All writes count together; what makes it smaller makes room for what makes it larger."""
    size = 24 + 1 + 1 + ENTRY_OVERHEAD_BYTES
    driver, session = ready(Limits(state_size_bytes_max=3 * size, maps_max=2))
    puts = [commands.put_key(b"m", b"%d" % number, b"v") for number in range(4)]
    assert decide(driver, session, b"", writes=puts[:3])[0] == COMMITTED
    too_much = {
        "state_size_bytes_max": [puts[3]],
        "maps_max": [
            *[commands.delete_key(b"m", b"%d" % number) for number in range(2)],
            commands.put_key(b"n", b"k", b""),
            commands.put_key(b"o", b"k", b""),
        ],
    }
    for number, (limit, writes) in enumerate(too_much.items()):
        before = content(driver)
        operation = commands.tx_decide(minted(counter=number), writes=writes)
        with pytest.raises(QuotaExceeded) as caught:
            driver.machine.check(session, 99, 0, operation)
        assert caught.value.limit == limit
        assert driver.run(session, operation)[:2] == [ABORTED, "quota"]
        assert before == content(driver)
    moved = [commands.delete_key(b"m", b"0"), puts[3]]
    assert decide(driver, session, b"", writes=moved)[0] == COMMITTED
    exchanged = [commands.put_key(b"n", b"k", b""), commands.put_key(b"o", b"k", b"")]
    exchanged += [commands.delete_key(b"m", b"%d" % number) for number in range(1, 4)]
    assert decide(driver, session, b"", writes=exchanged)[0] == COMMITTED
    assert driver.machine.counters["maps"] == 2
    driver.machine.check_invariants()


def test_what_is_to_be_appended_counts_what_is_pending() -> None:
    """The leader leaves room for what it has appended and not applied."""
    driver, session = ready(Limits(state_size_bytes_max=1000))
    operation = commands.tx_decide(b"", writes=[commands.put_key(b"m", b"k", b"v")])
    driver.machine.check(session, 1, 0, operation, 0, 800)
    with pytest.raises(QuotaExceeded):
        driver.machine.check(session, 1, 0, operation, 0, 900)


def test_too_many_with_participants_pending_are_refused() -> None:
    """None of those that are is dropped; others without participants go on."""
    driver, session = ready(Limits(tx_outcomes_max=3, tx_finished_max=3))
    fill(driver, session, 3)
    operation = commands.tx_decide(minted(counter=1), participants=[X])
    with pytest.raises(QuotaExceeded) as caught:
        driver.machine.check(session, 99, 0, operation)
    assert caught.value.limit == "tx_outcomes_max"
    assert driver.run(session, operation)[:2] == [ABORTED, "quota"]
    assert decide(driver, session, minted(counter=2))[0] == COMMITTED
    driver.run(session, commands.tx_forget([(minted(counter=101), b"x")]))
    assert decide(driver, session, minted(counter=3), participants=[X])[0] == COMMITTED
    assert driver.machine.counters["tx_pending"] == 3
    driver.machine.check_invariants()


def test_names_of_participants_count_as_well() -> None:
    """Records are bounded in bytes as maps are."""
    driver, session = ready(Limits(state_size_bytes_max=1000))
    long = [("r" * 200, "n" * 200, b"%d" % number) for number in range(2)]
    assert decide(driver, session, minted(counter=1), participants=long)[0] == COMMITTED
    operation = commands.tx_decide(minted(counter=2), participants=long)
    with pytest.raises(QuotaExceeded) as caught:
        driver.machine.check(session, 99, 0, operation)
    assert caught.value.limit == "state_size_bytes_max"
    assert driver.run(session, operation)[:2] == [ABORTED, "quota"]


@pytest.mark.parametrize("how", [(b"", [X]), (minted(), [X, ("other", "b", X[2])])])
def test_participants_need_a_transaction_and_branches_names_of_their_own(
    how: tuple[bytes, list[Any]],
) -> None:
    """Refused before it is appended, and answered so if it was."""
    driver, session = ready()
    operation = commands.tx_decide(how[0], participants=how[1])
    with pytest.raises(UsageError):
        driver.machine.check(session, 1, 0, operation)
    with pytest.raises(UsageError):
        driver.run(session, operation)
    assert driver.ask(commands.query_tx_list()) == [[], False]


def parts(**changed: Any) -> bytes:
    """A DECIDE with one argument as given."""
    names = ("gtid", "deadline", "participants", "guards", "conditions", "writes", "releases", "otherwise")
    values: dict[str, Any] = {name: [] for name in (*names, "extensions")}
    values |= {"gtid": b"", "deadline": 1, "otherwise": None}
    return encode([OpCode.TX_DECIDE.value, *(values | changed).values()])


@pytest.mark.parametrize(
    "operation",
    [
        parts(extensions=[1]),
        parts(conditions=[[3, b"m", b"k", 1]]),
        parts(writes=[[2, b"m", b"k"]]),
        parts(otherwise=[[2]]),
    ],
)
def test_kinds_of_a_newer_version_stop_the_node(operation: bytes) -> None:
    """As a number that is not known does: members that skipped them would differ from those that do not."""
    driver, session = ready()
    before = driver.machine.digest()
    with pytest.raises(UnknownCommand):
        driver.apply(session, operation)
    assert before == driver.machine.digest()
    with pytest.raises(RemoteProtocolError):
        driver.machine.check(session, 1, 0, operation)


@pytest.mark.parametrize(
    "operation",
    [
        parts(gtid=b"short"),
        parts(gtid=None),
        parts(gtid=""),
        parts(deadline=-1),
        parts(extensions={}),
        parts(participants=[["db", "a"]]),
        parts(participants=[["db", b"a", b"x"]]),
        parts(participants=[["db", "a", b""]]),
        parts(participants=[["db", "a", b"x" * 65]]),
        parts(guards=[[b"lock"]]),
        parts(conditions=[[]]),
        parts(conditions=[[-1, b"m", b"k", 1]]),
        parts(conditions=[[0, b"m", b"k", None]]),
        parts(conditions=[[1, b"m", b"k", 1]]),
        parts(conditions=[[True, b"m", 1]]),
        parts(writes=[[0, b"m", b"k", None]]),
        parts(writes=[[1, b"m", b"k", b"v"]]),
        parts(writes=[None]),
        parts(writes=None),
        encode([OpCode.TX_RESOLVE.value, b""]),
        encode([OpCode.TX_FORGET.value, [[minted()]]]),
        encode([OpCode.TX_HEURISTIC.value, minted(), b"", "committed", "me"]),
    ],
)
def test_malformed_transactions_are_a_protocol_error(operation: bytes) -> None:
    """Each refused when decoded, before any state is looked at."""
    with pytest.raises(RemoteProtocolError):
        commands.decode_operation(operation, Limits())


@pytest.mark.parametrize(
    ("limit", "build"),
    [
        (
            "tx_participants_max",
            lambda n: commands.tx_decide(minted(), participants=[("r", "n", b"%d" % i) for i in range(n)]),
        ),
        (
            "tx_conditions_max",
            lambda n: commands.tx_decide(b"", conditions=[commands.map_is_at(b"m", 0)] * n),
        ),
        ("tx_conditions_max", lambda n: commands.tx_decide(b"", guards=[(b"lock", 1)] * n)),
        ("tx_writes_max", lambda n: commands.tx_decide(b"", writes=[commands.delete_key(b"m", b"k")] * n)),
        ("tx_writes_max", lambda n: commands.tx_decide(b"", otherwise=[commands.delete_key(b"m", b"k")] * n)),
        ("tx_writes_max", lambda n: commands.tx_decide(b"", releases=[(b"lock", 1)] * n)),
        ("tx_writes_max", lambda n: commands.tx_forget([(minted(), b"x")] * n)),
    ],
)
def test_long_transactions_are_limited_by_name(limit: str, build: Callable[[int], bytes]) -> None:
    """The limit itself is allowed."""
    limits = Limits(tx_participants_max=3, tx_conditions_max=4, tx_writes_max=5)
    maximum: int = getattr(limits, limit)
    commands.decode_operation(build(maximum), limits)
    with pytest.raises(QuotaExceeded) as caught:
        commands.decode_operation(build(maximum + 1), limits)
    assert (limit, maximum, maximum + 1) == (caught.value.limit, caught.value.maximum, caught.value.wanted)


# --- what is remembered, and for how long -----------------------------------------------------------------


def test_participants_are_forgotten_one_by_one() -> None:
    """Again, or of what is not known: ignored."""
    driver, session = ready()
    gtid = minted()
    decide(driver, session, gtid, participants=[X, Y])
    assert driver.run(session, commands.tx_forget([(gtid, b"x"), (gtid, b"none"), (minted(5), b"x")])) == [1]
    assert state(driver, gtid)[5] == [list(Y)]
    assert driver.run(session, commands.tx_forget([(gtid, b"x"), (gtid, b"y"), (gtid, b"y")])) == [1]
    assert state(driver, gtid)[:2] == [COMMITTED, ""]
    assert driver.machine.counters["tx_pending"] == 0
    assert driver.machine.counters["tx_committed"] == 1


def test_an_abort_is_forgotten_when_its_transaction_could_not_be_committed_any_more() -> None:
    """Absence of a record then says the same."""
    driver, session = ready()
    gtid = minted()
    driver.run(session, commands.tx_resolve(gtid))
    driver.now_ms += LIFETIME_MS
    driver.run(session, commands.tx_forget([]))
    assert driver.machine.counters["tx_aborted"] == 1
    driver.now_ms += 1
    driver.run(session, commands.tx_forget([]))
    assert driver.machine.counters["tx_aborted"] == 0
    assert decide(driver, session, gtid)[0] == ABORTED
    assert driver.run(session, commands.tx_resolve(gtid))[0] == ABORTED
    assert driver.machine.counters["tx_horizon_ms"] == 0


def test_a_commit_is_remembered_for_the_retention_and_nothing_is_presumed_after_it() -> None:
    """A database restored from an old back-up that asks later is told that it is not known."""
    driver, session = ready()
    gtid, same, later = minted(counter=1), minted(counter=2), minted(START_MS + 1)
    decide(driver, session, gtid, participants=[X])
    driver.run(session, commands.tx_forget([(gtid, b"x")]))
    driver.now_ms += LIFETIME_MS + RETENTION_MS
    driver.run(session, commands.tx_forget([]))
    assert state(driver, gtid)[0] == COMMITTED
    driver.now_ms += 1
    driver.run(session, commands.tx_forget([]))
    assert driver.machine.counters["tx_horizon_ms"] == START_MS + 1
    for unknown in (gtid, same):
        assert state(driver, unknown)[:3] == [UNKNOWN, "horizon", 0]
        assert driver.run(session, commands.tx_resolve(unknown)) == [UNKNOWN, "horizon", 0]
        assert decide(driver, session, unknown) == [UNKNOWN, "horizon", 0, 0, -1]
    assert driver.run(session, commands.tx_resolve(later))[0] == ABORTED


def test_a_commit_that_was_not_obeyed_by_all_is_never_forgotten() -> None:
    """However long a participant is away, and however many come after it."""
    driver, session = ready(Limits(tx_outcomes_max=3, tx_finished_max=3))
    gtid = minted()
    decide(driver, session, gtid, participants=[X, Y])
    driver.run(session, commands.tx_forget([(gtid, b"y")]))
    for number in range(20):
        decide(driver, session, minted(driver.now_ms, counter=number))
        driver.now_ms += RETENTION_MS
    assert driver.machine.counters["tx_committed"] == 3
    assert state(driver, gtid)[:2] == [COMMITTED, ""]
    assert state(driver, gtid)[5] == [list(X)]
    driver.run(session, commands.tx_forget([(gtid, b"x")]))
    assert state(driver, gtid)[:2] == [UNKNOWN, "horizon"]


def test_of_too_many_commits_the_oldest_are_forgotten_first() -> None:
    """The horizon follows them; a transaction from before it is not committed, and not called aborted."""
    driver, session = ready(Limits(tx_outcomes_max=3, tx_finished_max=3))
    for number in range(4):
        decide(driver, session, minted(START_MS + number))
    assert driver.machine.counters["tx_committed"] == 3
    assert [state(driver, minted(START_MS + number))[0] for number in range(4)] == [UNKNOWN, *[COMMITTED] * 3]
    late = minted(START_MS - 50)
    assert decide(driver, session, late, writes=[commands.put_key(b"m", b"k", b"v")])[0] == UNKNOWN
    assert content(driver) == {}


def test_of_too_many_aborts_the_oldest_are_forgotten_first() -> None:
    """Nothing from before them is committed any more: their outcome stays what it was."""
    driver, session = ready(Limits(tx_outcomes_max=3, tx_finished_max=3))
    for number in range(4):
        driver.run(session, commands.tx_resolve(minted(START_MS + number)))
    assert driver.machine.counters["tx_aborted"] == 3
    assert decide(driver, session, minted(START_MS))[:2] == [ABORTED, "deadline"]
    assert decide(driver, session, minted(START_MS, counter=9))[:2] == [ABORTED, "deadline"]
    assert decide(driver, session, minted(START_MS + 1, counter=9))[0] == COMMITTED
    assert driver.machine.counters["tx_horizon_ms"] == 0


def test_forgetting_takes_a_little_of_each_command() -> None:
    """A thousand that are due at once are dropped a few at a time."""
    driver, session = ready()
    for number in range(1000):
        driver.run(session, commands.tx_resolve(minted(counter=number)), acknowledged=number)
    driver.now_ms += LIFETIME_MS + 1
    left = [driver.machine.counters["tx_aborted"]]
    while left[-1]:
        driver.run(session, commands.tx_forget([]), acknowledged=driver.last(session))
        left.append(driver.machine.counters["tx_aborted"])
    assert {1, 8} >= {before - after for before, after in itertools.pairwise(left)}


# --- after a restore from back-up -------------------------------------------------------------------------


def test_after_a_skip_nothing_is_presumed_of_what_has_no_record() -> None:
    """It may have been committed after the back-up: neither RESOLVE nor DECIDE says anything else; records stay."""
    driver, session = ready()
    kept, aborted, lost = minted(counter=1), minted(counter=2), minted(counter=3)
    decide(driver, session, kept, participants=[X])
    driver.run(session, commands.tx_resolve(aborted))
    assert driver.run(session, commands.tx_skip(START_MS + 1)) == [START_MS + 1, True]
    for machine in (driver.machine, restore(snapshot(driver.machine))):
        driver.machine = machine
        assert state(driver, kept)[0] == COMMITTED
        assert state(driver, aborted)[0] == ABORTED
        assert state(driver, lost)[:3] == [TxStatus.UNKNOWN, "horizon", 0]
        assert driver.ask(commands.query_tx_clock()) == [START_MS, LIFETIME_MS, START_MS + 1]
    assert driver.run(session, commands.tx_resolve(lost))[:2] == [TxStatus.UNKNOWN, "horizon"]
    writes = [commands.put_key(b"m", b"k", b"v")]
    assert decide(driver, session, lost, writes=writes)[:2] == [TxStatus.UNKNOWN, "horizon"]
    assert content(driver) == {}
    driver.run(session, commands.tx_forget([(kept, b"x")]))
    assert state(driver, kept)[0] == COMMITTED
    assert decide(driver, session, minted(START_MS + 1))[0] == COMMITTED


def test_a_skip_never_goes_back_nor_far_ahead() -> None:
    """Repeated it changes nothing; a horizon in the wrong unit would end all transactions."""
    driver, session = ready()
    driver.run(session, commands.tx_skip(START_MS))
    assert driver.run(session, commands.tx_skip(START_MS - 5)) == [START_MS, False]
    with pytest.raises(UsageError, match="clocks"):
        driver.run(session, commands.tx_skip(START_MS + 2 * LIFETIME_MS + 1))
    assert driver.run(session, commands.tx_skip(START_MS + 2 * LIFETIME_MS))[1]


# --- heuristics -------------------------------------------------------------------------------------------


def test_a_heuristic_is_kept_for_people_and_no_longer_pending() -> None:
    """With or without a record of the transaction, and until somebody has seen to it."""
    driver, session = ready()
    gtid = minted()
    decide(driver, session, gtid, participants=[X, Y])
    assert driver.run(session, commands.tx_heuristic(gtid, b"x", "rolled back", "dba")) == [True]
    assert driver.run(session, commands.tx_heuristic(gtid, b"x", "hazard", "dba")) == [False]
    assert driver.run(session, commands.tx_heuristic(minted(7), b"z", "committed", "dba")) == [False]
    assert state(driver, gtid)[5:] == [[list(Y)], [[b"x", "hazard", "dba", START_MS]]]
    rows = [
        [minted(7), b"z", "committed", "dba", START_MS],
        [gtid, b"x", "hazard", "dba", START_MS],
    ]
    assert driver.ask(commands.query_tx_heuristics()) == [rows, False]
    assert driver.ask(commands.query_tx_heuristics(limit=1)) == [rows[:1], True]
    assert driver.ask(commands.query_tx_heuristics((minted(7), b"z"))) == [rows[1:], False]
    driver.run(session, commands.tx_heuristic(gtid, b"x", "", "dba"))
    driver.run(session, commands.tx_heuristic(gtid, b"none", "", "dba"))
    assert driver.ask(commands.query_tx_heuristics()) == [rows[:1], False]
    assert state(driver, gtid)[5] == [list(Y)]


def test_only_the_newest_heuristics_are_kept() -> None:
    """Also by a machine that was restored."""
    driver, session = ready()
    for number in range(HEURISTICS_MAX):
        gtid = minted(counter=number * 7919 % HEURISTICS_MAX)
        driver.run(session, commands.tx_heuristic(gtid, b"x", "hazard", "a"), acknowledged=number)
    machines = [driver.machine, restore(snapshot(driver.machine))]
    for machine in machines:
        driver.machine = machine
        driver.index = machine.applied_index
        driver.sequences[session] = HEURISTICS_MAX
        driver.run(session, commands.tx_heuristic(minted(5), b"x", "hazard", "a"))
        assert driver.machine.counters["tx_heuristics"] == HEURISTICS_MAX
        assert state(driver, minted(counter=0))[6] == []
        assert len(state(driver, minted(counter=7919 % HEURISTICS_MAX))[6]) == 1
        machine.check_invariants()
    assert machines[0].digest() == machines[1].digest()


# --- looking ----------------------------------------------------------------------------------------------


def test_whoever_is_in_doubt_learns_whether_the_initiator_lives() -> None:
    """And log_time, against which the deadline is held."""
    driver, session = ready()
    gtid = minted(session=session)
    assert state(driver, gtid) == [NONE, "", 0, True, START_MS, [], []]
    driver.now_ms += 5
    driver.run(0, commands.expire_sessions([session]))
    assert state(driver, gtid) == [NONE, "", 0, False, START_MS + 5, [], []]
    assert driver.ask(commands.query_time()) == [START_MS + 5]


def test_outcomes_are_listed_page_by_page() -> None:
    """All of them in table order, those that are pending from the oldest."""
    driver, session = ready()
    for number in range(30):
        participants = [X] if number % 3 == 0 else []
        decide(driver, session, minted(START_MS - number), participants=participants)
    everything = driver.ask(commands.query_tx_list())
    assert (len(everything[0]), everything[1]) == (30, False)
    for only_pending, count in ((False, 30), (True, 10)):
        rows: list[Any] = []
        more = True
        while more:
            after = rows[-1][0] if rows else None
            page, more = driver.ask(commands.query_tx_list(after, 7, only_pending))
            assert len(page) <= 7
            rows += page
        assert len({row[0] for row in rows}) == len(rows) == count
        assert only_pending <= all(row[4] == [list(X)] for row in rows)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)


def test_a_page_is_bounded_in_bytes() -> None:
    """Participants with long names do not make a reply that no message can carry."""
    driver, session = ready()
    names = [("r" * 250, "n" * 250, b"%d" % number) for number in range(60)]
    for number in range(20):
        decide(driver, session, minted(counter=number), participants=names)
    page, more = driver.ask(commands.query_tx_list(only_pending=True))
    assert more and 1 < len(page) < 20
    assert len(encode(page)) < 300_000


def test_a_restored_machine_remembers_and_forgets_as_the_others_do() -> None:
    """Outcomes, pending ones, heuristics, horizon and close; and goes on alike."""
    driver, session = ready(Limits(tx_outcomes_max=4, tx_finished_max=4))
    for number in range(30):
        gtid = minted(START_MS - number % 7, counter=number)
        if number % 3:
            decide(driver, session, gtid, participants=[X] if number % 5 == 0 else [])
        else:
            driver.run(session, commands.tx_resolve(gtid))
        driver.run(session, commands.tx_heuristic(gtid, b"x", "hazard", "a"))
    copy = Driver(machine=restore(snapshot(driver.machine)))
    copy.now_ms, copy.sequences = driver.now_ms, dict(driver.sequences)
    assert driver.machine.counters["tx_horizon_ms"] > 0
    assert driver.machine._transactions.close_ms > 0
    for number in range(20):
        for each in (driver, copy):
            each.run(session, commands.tx_resolve(minted(START_MS + number)))
            decide(each, session, minted(START_MS + number, counter=9))
            each.now_ms += 60_000
            each.machine.check_invariants()
        assert driver.machine.digest() == copy.machine.digest()
    assert driver.replay(driver.machine.limits).digest() == driver.machine.digest()


def test_a_transaction_reads_at_one_moment() -> None:
    """The value, its revision, the map's and the log's, and whether what was read before still holds."""
    driver = Driver()
    session = driver.open()
    (first,) = driver.run(session, commands.map_put(b"m", b"a", b"1", None))
    (second,) = driver.run(session, commands.map_put(b"m", b"b", b"2", None))
    read = commands.key_is_at(b"m", b"a", first)
    assert driver.ask(commands.query_tx_read(b"m", b"b", [read])) == [-1, b"2", second, second, second]
    assert driver.ask(commands.query_tx_read(b"m", b"c")) == [-1, None, 0, second, second]
    (third,) = driver.run(session, commands.map_put(b"m", b"a", b"3", None))
    assert driver.ask(commands.query_tx_read(b"m", b"b", [read])) == [0, b"2", second, third, third]
    assert driver.ask(commands.query_tx_read(b"none", b"b")) == [-1, None, 0, 0, third]
