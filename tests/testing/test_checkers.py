"""The checkers on histories whose verdict is known, and on many small ones against a checker that tries everything."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordlib.testing.checkers import Verdict, check
from coordlib.testing.history import Operation
from tests.testing.naive import is_lock_legal, is_register_legal

SECOND = 1_000_000_000


def _o(text: str, client: str = "", key: str = "x") -> Operation:
    """
    An operation from `call..return op input -> output`; `call..` is unknown, `!` as output failed.

    Tokens and values are numbers; `acquire 5` has a lease of 5, `acquire` none; "no" is refused.
    """
    left, _, right = text.partition("->")
    words, answer = left.split(), right.strip().replace("!", "")
    call, _, end = words[0].partition("..")
    op, arguments = words[1], [None if word == "none" else int(word) for word in words[2:]]
    output: Any = None
    value: Any = arguments[0] if arguments else None
    if op == "cas":
        value, output = arguments, answer == "yes"
    elif op == "acquire":
        value = {"owner": client or "someone", "ttl_ns": value}
        output = {"ok": False, "token": None} if answer == "no" else {"ok": True, "token": int(answer or 0)}
    elif op in ("renew", "release"):
        value, output = {"token": value}, {"ok": answer == "ok"}
    elif op == "get" and answer not in ("", "none"):
        output = [int(part) for part in answer[1:-1].split()] if answer[0] == "[" else int(answer)
    elif op == "delete" and answer in ("yes", "no"):
        output = answer == "yes"
    status: Any = "fail" if "!" in right else "ok" if end else None
    return Operation(
        client or f"c{call}",
        op,
        key,
        value,
        output if status == "ok" else None,
        int(call),
        int(end) if end else None,
        status,
    )


def _history(text: str) -> list[Operation]:
    return [_o(part.strip()) for part in text.split(";")]


LEGAL = {
    "nothing": "0.. put 1",
    "one after the other": "0..1 put 1; 2..3 get -> 1; 4..5 put 2; 6..7 get -> 2",
    "a missing key": "0..1 get -> none; 2..3 put 1; 4..5 delete -> yes; 6..7 get -> none; 8..9 delete -> no",
    "reads on both sides of a slow put": "0..10 put 1; 1..2 get -> none; 3..4 get -> 1; 5..6 get -> 1",
    "an unknown put that is seen late": "0..1 put 1; 2.. put 2; 10..11 get -> 1; 20..21 get -> 2",
    "an unknown put that is never seen": "0..1 put 1; 2.. put 2; 10..11 get -> 1; 20..21 get -> 1",
    "an unknown put that lets a later swap fail": "0..1 put 1; 2.. put 2; 5..6 cas 1 3 -> no",
    "an unknown swap that is seen": "0..1 put 1; 2.. cas 1 2; 9..10 get -> 2",
    "an unknown delete": "0..1 put 1; 2.. delete; 9..10 get -> none",
    "a failed put that is not seen": "0..1 put 1; 2..3 put 2 -> !; 4..5 get -> 1",
    "inserting where nothing is": "0..1 cas none 1 -> yes; 2..3 cas none 2 -> no; 4..5 cas 1 none -> yes; 6..7 get -> none",
    "swaps in the order of their answers": "0..9 cas 1 2 -> yes; 0..9 cas 2 3 -> yes; 0..9 put 1",
    "appends in either order": "0..9 append 1; 0..9 append 2; 10..11 get -> [2 1]",
    "what touches overlaps": "0..5 put 1; 5..6 get -> none",
    "grants one after the other": "0..1 acquire -> 3; 2..3 release 3 -> ok; 4..5 acquire -> 4; 6..7 renew 4 -> ok",
    "a grant after the session ended": "0..1 acquire -> 3; 4..5 acquire -> 4; 6..7 release 3 -> no; 8..9 release 4 -> ok",
    "a grant at the end of a lease": "0..1 acquire 10 -> 1; 9..10 acquire 10 -> 2; 11..12 renew 1 -> no",
    "a late renewal where nobody else came": "0..1 acquire 10 -> 1; 50..51 renew 1 -> ok; 52..60 acquire 10 -> 2",
    "an acquire that waited": "0..1 acquire 10 -> 1; 2..30 acquire 10 -> 2; 5..6 renew 1 -> ok",
    "refused while held": "0..1 acquire 10 -> 1; 2..3 acquire 10 -> no; 4..5 release 1 -> ok",
    "refused while another gave up": "0..9 acquire 10 -> !; 1..2 acquire 10 -> no",
    "an unknown acquire that was granted": "0.. acquire; 5..6 acquire -> no; 7..8 acquire -> 2; 9..10 release 2 -> ok",
    "a token from an unknown acquire": "0.. acquire 10; 5..6 release 4 -> ok; 7..8 acquire 10 -> 5",
    "an unknown release": "0..1 acquire 10 -> 1; 2.. release 1; 5..6 acquire 10 -> 2",
}

ILLEGAL = {
    "a stale read": "0..1 put 1; 2..3 put 2; 4..5 get -> 1",
    "a read that goes back": "0..1 put 1; 2..20 put 2; 3..4 get -> 2; 5..6 get -> 1",
    "a lost update": "0..1 put 1; 2..3 put 2; 4..5 get -> none",
    "a dirty read": "0..1 put 1; 2..3 put 2 -> !; 4..5 get -> 2",
    "two swaps of one value": "0..1 put 1; 2..9 cas 1 2 -> yes; 2..9 cas 1 3 -> yes",
    "a swap that failed though it fitted": "0..1 put 1; 2..3 cas 1 2 -> no",
    "a value that was never written": "0..1 put 1; 2..3 get -> 7",
    "a value read before it was written": "0..1 get -> 1; 2..3 put 1",
    "an unknown put that is seen and then not": "0..1 put 1; 2.. put 2; 4..5 get -> 2; 6..7 get -> 1",
    "an unknown put seen before its call": "0..1 get -> 2; 2.. put 2",
    "an unknown put seen twice": "0.. put 2; 1..2 get -> 2; 3..4 put 1; 5..6 get -> 2",
    "a failed write that lets a swap succeed": "0..1 put 1 -> !; 2..3 cas 1 2 -> yes",
    "a deleted value": "0..1 put 1; 2..3 delete; 4..5 get -> 1",
    "a delete that found nothing": "0..1 put 1; 2..3 delete -> no",
    "two deletes of one value": "0..1 put 1; 2..5 delete -> yes; 2..5 delete -> yes",
    "a lost append": "0..1 append 1; 2..3 append 2; 4..5 get -> [2]",
    "appends out of order": "0..1 append 1; 2..3 append 2; 4..5 get -> [2 1]",
    "an append that happened twice": "0..1 append 1; 4..5 get -> [1 1]",
    "an append to a number": "0..1 put 1; 4..5 append 1",
    "two holders": "0..1 acquire 100 -> 1; 2..3 acquire 100 -> 2; 4..5 renew 1 -> ok",
    "two holders, one silent": "0..1 acquire 100 -> 1; 2..3 acquire 100 -> 2",
    "two holders of sessions": "0..1 acquire -> 1; 2..3 acquire -> 2; 4..5 renew 1 -> ok",
    "a token that is used again": "0..1 acquire -> 1; 2..3 release 1 -> ok; 4..5 acquire -> 1",
    "a token that goes back": "0..1 acquire -> 5; 2..3 release 5 -> ok; 4..5 acquire -> 4",
    "a release by a stale holder": "0..1 acquire -> 1; 2..3 acquire -> 2; 4..5 release 1 -> ok",
    "a release of a token never granted": "0..1 acquire -> 1; 4..5 release 3 -> ok",
    "two releases of one grant": "0..1 acquire -> 1; 2..9 release 1 -> ok; 2..9 release 1 -> ok",
    "an early expiry": "0..1 acquire 10 -> 1; 5..9 acquire 10 -> 2",
    "an early expiry after a renewal": "0..1 acquire 10 -> 1; 8..9 renew 1 -> ok; 12..17 acquire 10 -> 2",
    "an early refusal": "0..1 acquire 10 -> 1; 5..9 renew 1 -> no",
    "accepted after it was refused": "0..1 acquire -> 1; 2..3 renew 1 -> no; 4..5 release 1 -> ok",
    "refused though it is free": "0..1 acquire -> 1; 2..3 release 1 -> ok; 4..5 acquire -> no",
    "no room for the token of an unknown acquire": "0.. acquire; 1..2 release 1 -> ok; 3..4 acquire -> 1",
    "a lease that waited for others": "0..50 acquire 10 -> 2; 10..20 acquire -> 1; 21..22 release 1 -> ok; 23..25 acquire -> 3",
}


def _naive(operations: list[Operation]) -> bool:
    is_lock = operations[0].op in ("acquire", "renew", "release")
    return is_lock_legal(operations) if is_lock else is_register_legal(operations)


@pytest.mark.parametrize("text", LEGAL.values(), ids=LEGAL)
def test_it_accepts_what_is_legal(text: str) -> None:
    """None of these is a violation, though some look like it; the naive checker agrees."""
    operations = _history(text)
    assert check(operations) == Verdict("legal", "", 1, (), (), len(operations), check(operations).steps)
    assert _naive(operations)


@pytest.mark.parametrize("text", ILLEGAL.values(), ids=ILLEGAL)
def test_it_rejects_what_is_illegal(text: str) -> None:
    """Each is rejected and explained; the naive checker agrees."""
    operations = _history(text)
    verdict = check(operations)
    assert verdict.result == "illegal" and len(verdict.illegal_keys) == 1
    assert "is not linearizable" in verdict.explanation
    assert not _naive(operations)


def test_values_are_those_of_json() -> None:
    """true is not 1, and lists and objects are compared by what they hold."""

    def result(put: Any, get: Any) -> str:
        written = Operation("a", "put", "x", put, None, 0, 1, "ok")
        return check([written, Operation("a", "get", "x", None, get, 2, 3, "ok")]).result

    assert result(True, True) == result([1, {"a": [None]}], [1, {"a": [None]}]) == "legal"
    assert result(True, 1) == result(1, True) == result([1], 1) == result({"a": 1}, {"a": 2}) == "illegal"


def test_text_is_appended_to_text() -> None:
    """Where a key holds text, what is appended is put behind it; elsewhere a list grows."""
    operations = [
        Operation("a", "append", "x", "one ", None, 0, 1, "ok"),
        Operation("a", "append", "x", "two", None, 2, 3, "ok"),
        Operation("a", "get", "x", None, "one two", 4, 5, "ok"),
    ]
    assert check(operations).is_legal
    assert check([*operations[:2], operations[2]._replace(output=["one ", "two"])]).is_legal
    assert check([*operations[:2], operations[2]._replace(output="two")]).result == "illegal"


def test_keys_are_judged_each_by_itself() -> None:
    """An order across keys does not matter; a lock and a register of one name are two keys."""
    operations = [
        _o("0..1 put 1", key="x"),
        _o("2..3 get -> none", key="y"),
        _o("2..3 acquire -> 1", key="x"),
    ]
    assert check(operations).keys == 3 and check(operations).is_legal
    verdict = check([*operations, _o("4..5 get -> 2", key="y"), _o("4..5 get -> 2", key="x")])
    assert verdict.illegal_keys == ("register 'x'", "register 'y'")
    assert "Also not linearizable: register 'y'." in verdict.explanation


# -- explanations ------------------------------------------------------------------------------------------------


def test_an_explanation_shows_the_few_operations_that_matter() -> None:
    """Of a long history only the two writes and the stale read are left, with what was seen and what was there."""
    operations = []
    for n in range(40):
        operations += [
            _o(f"{4 * n}..{4 * n + 1} put {n}", "w"),
            _o(f"{4 * n + 2}..{4 * n + 3} get -> {n}", "r"),
        ]
    operations.append(_o("161..162 get -> 7", "stale"))
    explanation = check(operations).explanation
    assert explanation == (
        "register 'x' is not linearizable; it takes 3 of its 81 operations to show it.\n"
        "\n"
        "#  client  called  returned  operation\n"
        "1  w            0      1 ns  put 7\n"
        "2  w         8 ns      9 ns  put 9\n"
        "3  stale   133 ns    134 ns  get -> 7\n"
        "\n"
        "In time (not to scale):\n"
        "1  |-|             put 7\n"
        "2      |-|         put 9\n"
        "3          |-|     get -> 7\n"
        "\n"
        "The longest order found begins where the register holds nothing:\n"
        "    1  put 7; then the register holds 7\n"
        "    2  put 9; then the register holds 9\n"
        "\n"
        "None of the others can come next:\n"
        "    3  get -> 7: it read 7, but the register holds 9"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0..1 put 1; 2..3 get -> 7", "no operation ever wrote that"),
        (ILLEGAL["a dirty read"], "is said to have failed"),
        (ILLEGAL["a value read before it was written"], "that was written only later"),
        (ILLEGAL["two swaps of one value"], "it swapped, expecting 1, but the register holds"),
        (ILLEGAL["two deletes of one value"], "it found a value, but the register holds nothing"),
        (ILLEGAL["an append to a number"], "nothing can be appended, for the register holds 1"),
        (
            ILLEGAL["two holders"],
            "before the lease could have expired: the lock is held with token 1, until 100 ns",
        ),
        (ILLEGAL["a token that goes back"], "it was granted token 4, but token 5 was granted before it"),
        (ILLEGAL["a release by a stale holder"], "accepted with token 1, but the lock is held with token 2"),
        (ILLEGAL["an early refusal"], "it was refused before its lease could have expired"),
        (ILLEGAL["refused though it is free"], "it was refused, but the lock is free"),
        ("0..1 put 1; 2.. put 2; 4..5 get -> 2; 6..7 get -> 1", "(taken to have happened)"),
        ("0.. delete; 1..2 append 1; 3..4 get -> [2]", "may have happened, but that does not help"),
        ("0..1 get -> 7; 2..3 put 1", "Nothing can come first"),
    ],
)
def test_an_explanation_says_what_was_seen_and_what_was_there(text: str, said: str) -> None:
    """The reason is that of the history, in its own words."""
    assert said in check(_history(text)).explanation


def test_what_is_left_out_never_makes_up_another_reason() -> None:
    """The write that a stale read saw stays: without it the read would seem to come from nowhere."""
    explanation = check(
        _history("0..1 put 1; 2..3 get -> 1; 4..5 put 2; 6..7 get -> 1; 8..9 put 3")
    ).explanation
    assert "takes 3 of its 5" in explanation and "never wrote" not in explanation
    explanation = check(
        _history("0..1 acquire 9 -> 1; 2..3 release 1 -> ok; 4..5 acquire -> 2; 6..7 renew 1 -> ok")
    ).explanation
    assert "accepted with token 1" in explanation and "acquire by someone for 9 ns -> token 1" in explanation


# -- limits --------------------------------------------------------------------------------------------------


def _hard(key: str = "x", *, count: int = 14) -> list[Operation]:
    """All at once, with one read that nothing explains: every order of every part of it has to be tried."""
    operations = [_o(f"0..9 put {n}", f"w{n}", key) for n in range(count)]
    reads = [_o(f"0..9 cas {n} {n + 100} -> yes", f"s{n}", key) for n in range(count)]
    return [*operations, *reads, _o("0..9 get -> 1000", "r", key)]


def test_a_search_over_its_budget_is_unknown() -> None:
    """Never "legal", and it says which key."""
    verdict = check(_hard(), steps_max=1000)
    assert (verdict.result, verdict.unknown_keys, verdict.steps) == ("unknown", ("register 'x'",), 1000)
    assert "1 of 1 keys could not be judged" in verdict.explanation


def test_a_budget_that_just_suffices_suffices() -> None:
    """The budget is exact: one step less and the verdict is unknown."""
    operations = _history(LEGAL["reads on both sides of a slow put"])
    steps = check(operations).steps
    assert check(operations, steps_max=steps).result == "legal"
    assert check(operations, steps_max=steps - 1).result == "unknown"


def test_a_search_over_its_time_is_unknown() -> None:
    """The clock that is handed in decides."""
    ticks = iter(range(1000))
    verdict = check(_hard(), time_limit_seconds=10, clock=lambda: next(ticks))
    assert verdict.result == "unknown"
    assert verdict.steps < 256 * 10
    assert check(_history("0..1 put 1"), time_limit_seconds=0, clock=lambda: 0).result == "unknown"


def test_one_percent_of_the_keys_may_be_unknown() -> None:
    """More fails the whole; and an illegal key is illegal whatever else is unknown."""
    many = [_o("0..1 put 1", key=f"k{n}") for n in range(99)]
    assert check([*many, *_hard()], steps_max=1000).result == "legal"
    assert check([*many, *_hard()], steps_max=1000).unknown_keys == ("register 'x'",)
    assert check([*many[1:], *_hard()], steps_max=1000).result == "unknown"
    verdict = check([*_hard(), *_history(ILLEGAL["two holders"])], steps_max=1000)
    assert verdict.result == "illegal" and verdict.unknown_keys == ("register 'x'",)


def _made(rng: random.Random, *, count: int, keys: int, clients: int, unknown: float) -> list[Operation]:
    """A history of a register that is sound, by clients that each go on as soon as they have their answer."""
    free = [0] * clients
    planned = []
    for serial in range(count):
        client = min(range(clients), key=free.__getitem__)
        call = free[client] + rng.randint(1, 50)
        point = call + rng.randint(0, 200)
        free[client] = point + rng.randint(0, 200)
        planned.append((point, client, call, free[client], serial))
    registers: dict[str, int] = {}
    operations = []
    for _, client, call, returned, serial in sorted(planned):
        key = f"k{rng.randrange(keys)}"
        op = rng.choice(("put", "get", "cas"))
        value = registers.get(key)
        old = value if rng.random() < 0.6 else rng.randrange(serial + 1)
        is_unknown = rng.random() < unknown
        is_done = not is_unknown or rng.random() < 0.5
        if is_done and (op == "put" or (op == "cas" and value == old)):
            registers[key] = serial
        operations.append(
            Operation(
                f"c{client}",
                op,
                key,
                {"put": serial, "get": None, "cas": [old, serial]}[op],
                None if is_unknown else {"put": None, "get": value, "cas": value == old}[op],
                call,
                None if is_unknown else returned,
                None if is_unknown else "ok",
            )
        )
    return operations


def test_a_thousand_operations_take_a_few_thousand_steps() -> None:
    """On 20 keys with a tenth unknown. A step takes about 3 microseconds."""
    for seed in range(5):
        operations = _made(random.Random(seed), count=1000, keys=20, clients=20, unknown=0.1)
        verdict = check(operations)
        assert verdict.is_legal and verdict.steps < 20_000


# -- against the naive one -----------------------------------------------------------------------------------


def _interval(draw: st.DrawFn, end: int) -> tuple[int, int | None, Any]:
    call = draw(st.integers(0, end))
    status = draw(st.sampled_from(("ok", "ok", "ok", "ok", None, "fail")))
    return call, None if status is None else draw(st.integers(call, end)), status


@st.composite
def _registers(draw: st.DrawFn) -> list[Operation]:
    operations = []
    values = st.integers(0, 2)
    maybe = st.one_of(st.none(), values)
    for n in range(draw(st.integers(1, 6))):
        call, returned, status = _interval(draw, 7)
        op = draw(st.sampled_from(("put", "get", "get", "cas", "delete", "append")))
        given: Any = None
        answer: Any = None
        if op in ("put", "append"):
            given = draw(values)
        elif op == "get":
            answer = draw(st.one_of(maybe, st.lists(values, min_size=1, max_size=2)))
        elif op == "cas":
            given, answer = [draw(maybe), draw(maybe)], draw(st.booleans())
        else:
            answer = draw(st.sampled_from((None, True, False)))
        answer = answer if status == "ok" else None
        operations.append(Operation(f"c{n}", op, "x", given, answer, call, returned, status))
    return operations


@st.composite
def _locks(draw: st.DrawFn) -> list[Operation]:
    operations = []
    leases = st.just(None) if draw(st.booleans()) else st.sampled_from((None, 0, 2, 4))
    for n in range(draw(st.integers(1, 6))):
        call, returned, status = _interval(draw, 8)
        op = draw(st.sampled_from(("acquire", "acquire", "renew", "release")))
        token = draw(st.integers(0, 3))
        is_ok = draw(st.booleans())
        if op == "acquire":
            given: Any = {"owner": f"c{n}", "ttl_ns": draw(leases)}
            answer: Any = {"ok": is_ok, "token": token if is_ok else None}
        else:
            given, answer = {"token": token}, {"ok": is_ok}
        answer = answer if status == "ok" else None
        operations.append(Operation(f"c{n}", op, "x", given, answer, call, returned, status))
    return operations


@settings(max_examples=250, deadline=None, derandomize=True)
@given(_registers())
def test_registers_are_judged_as_by_trying_everything(operations: list[Operation]) -> None:
    """Same verdict, and an illegal one can be explained."""
    verdict = check(operations)
    assert verdict.result == ("legal" if is_register_legal(operations) else "illegal")
    assert bool(verdict.explanation) == (verdict.result == "illegal")


@settings(max_examples=250, deadline=None, derandomize=True)
@given(_locks())
def test_locks_are_judged_as_by_trying_everything(operations: list[Operation]) -> None:
    """Same verdict; the earliest instants that the model keeps are enough."""
    verdict = check(operations)
    assert verdict.result == ("legal" if is_lock_legal(operations) else "illegal")
    assert bool(verdict.explanation) == (verdict.result == "illegal")


def test_the_document_shows_what_is_said() -> None:
    """The example of docs/histories.md is the checker's own output, but for how much was left out."""
    document = (Path(__file__).resolve().parents[2] / "docs" / "histories.md").read_text(encoding="utf-8")
    shown = document.split("## How to read an explanation")[1].split("```")[1].strip()
    million = 1_000_000
    operations = [
        _o(f"0..{million} put 1", "w"),
        _o(f"{2 * million}.. put 2", "v"),
        _o(f"{4 * million}..{5 * million} get -> 2", "r"),
        _o(f"{6 * million}..{7 * million} get -> 1", "r"),
    ]
    operations += [_o(f"{n * million}..{(n + 1) * million} put {n}", "more") for n in range(10, 64)]
    assert check(operations).explanation == shown
