"""Arguments in, exit code out. What each subcommand does is in its own module, imported only when it runs.

Exit codes: 0 it is well; 1 what was asked about is not well (a failed proof, a cluster without a leader, a
check that failed); 2 it could not be done, or not be found out: wrong arguments, or an error, told in one
message on standard error; 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Final

import coordlib
from coordlib.errors import CoordError
from coordlib.ids import LAYOUTS

__all__ = ["main"]

EXIT_ERROR: Final = 2
EXIT_INTERRUPTED: Final = 130

_ENVIRONMENT: Final = (
    "Without --config and other settings, they come from the environment: COORDLIB_CLUSTER, COORDLIB_NODE, "
    "COORDLIB_MEMBERS, COORDLIB_SECRET or COORDLIB_SECRET_FILE, COORDLIB_DATA_DIR, and so on. A secret is never an "
    "argument: other users of the machine can read those."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code. Errors are told in words, without a traceback."""
    arguments = _parser().parse_args(argv)
    if arguments.command != "serve":
        # What these have to say is their answer; a log beside it would only say it twice.
        logging.getLogger("coordlib").addHandler(logging.NullHandler())
    try:
        run = importlib.import_module(arguments.module).run
        code: int = run(arguments)
        sys.stdout.flush()
        return code
    except CoordError as error:
        print(f"coordlib {arguments.command}: {error.args[0] if error.args else error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print(f"coordlib {arguments.command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (`| head`) has gone. Nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="coordlib", description=coordlib.__doc__)
    parser.add_argument("--version", action="version", version=f"coordlib {coordlib.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, *, epilog: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", epilog=epilog
        )
        sub.set_defaults(module=f"coordlib.cli.{name}")
        return sub

    serve = command("serve", "run a plain member until SIGTERM or SIGINT", epilog=_ENVIRONMENT)
    serve.add_argument(
        "--config", metavar="FILE", help="TOML; its keys are the arguments of coordlib.Cluster"
    )
    serve.add_argument("--cluster", help="the cluster's name")
    serve.add_argument("--node", help="this member's name")
    serve.add_argument("--members", metavar="NAME=ENDPOINT,...", help="every member, this one included")
    serve.add_argument("--data-dir", metavar="DIR", help="a directory that no other node uses")
    serve.add_argument("--bind", metavar="ENDPOINT", help="where to listen, if not at this member's endpoint")
    serve.add_argument("--secret-file", metavar="FILE", help="holds the secret, or several, newest first")
    serve.add_argument("--bootstrap", action="store_true", help="form a new cluster with a quorum of members")
    serve.add_argument("--start-timeout", metavar="SECONDS", type=float, help="by default 30")
    serve.add_argument("--verbose", action="store_true", help="log what is of interest, not only warnings")

    status = command("status", "show the members, with or without a leader", epilog=_ENVIRONMENT)
    _attach_arguments(status)
    status.add_argument("--json", action="store_true", help="all that the members tell, as one JSON object")

    locks = command("locks", "list who holds which lock, and how many wait", epilog=_ENVIRONMENT)
    _attach_arguments(locks)
    locks.add_argument("--json", action="store_true", help="as one JSON list")

    ids = command("ids", "read or mint ids, or skip those of an original after a restore")
    _ids_arguments(ids)

    tx = command("tx", "list transactions, show what is in doubt, and record what people decide")
    _tx_arguments(tx)

    keys = command("keys", "make a secret for a cluster")
    keys.add_argument("action", choices=["new"], help="print a new secret; give the same to every member")

    doctor = command("doctor", "check this machine and these settings", epilog=_ENVIRONMENT)
    doctor.add_argument(
        "--config", metavar="FILE", help="TOML; its keys are the arguments of coordlib.Cluster"
    )

    demo = command("demo", "three applications through kill -9 of the leader's, with proofs at the end")
    demo.add_argument("--plain", action="store_true", help="plain lines, also on a terminal")
    demo.add_argument(
        "--db",
        choices=["postgres", "mariadb"],
        default="",
        help="what the services of the orders keep theirs in: started from installed binaries, and thrown away; "
        "by default files and a journal",
    )
    demo.add_argument(
        "--sabotage",
        choices=["lock", "ack", "order"],
        default="",
        help="break it on purpose: the proof must fail",
    )
    demo.add_argument("--seconds", type=float, default=12.0, help=argparse.SUPPRESS)

    check = command(
        "check",
        "judge a recorded history of registers and locks",
        epilog="Exit codes: 0 it is linearizable, 1 it is not (and why), 2 that could not be found out. "
        "The format of the files is in docs/histories.md.",
    )
    check.add_argument(
        "files", nargs="+", metavar="FILE", help="JSON lines; several are judged as one history"
    )
    check.add_argument(
        "--time-limit", metavar="SECONDS", type=float, default=60.0, help="for all of it; by default 60"
    )
    check.add_argument(
        "--steps",
        metavar="N",
        type=int,
        default=500_000,
        help="of the search, for each key; by default 500000",
    )

    bench = command("bench", "measure this machine (needs the source tree)")
    bench.add_argument("rest", nargs=argparse.REMAINDER, help="arguments of benchmarks/run.py")
    return parser


def _ids_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, text: str) -> argparse.ArgumentParser:
        description = text[0].upper() + text[1:] + "."
        sub = actions.add_parser(name, help=text, description=description, epilog=_ENVIRONMENT)
        _attach_arguments(sub)
        return sub

    inspect = action(
        "inspect", "show the time, worker and sequence of an id; with --name, ask the cluster who minted it"
    )
    inspect.add_argument("id", metavar="ID")
    mint = action("mint", "print new ids: of the cluster's, or with --worker without a cluster")
    mint.add_argument("-n", dest="count", metavar="N", type=int, default=1, help="how many; by default 1")
    mint.add_argument(
        "--worker", metavar="N", type=int, help="without a cluster; the number of no other process"
    )
    for sub in (inspect, mint):
        sub.add_argument("--name", help="of a generator of the cluster")
        sub.add_argument("--layout", choices=LAYOUTS, help="by default the generator's, or the default one")
        sub.add_argument(
            "--form",
            choices=("decimal", "base32", "base62", "hex"),
            default="decimal",
            help="by default decimal",
        )
    skip = action("skip", "after a restore from back-up, mint no id that the original may have minted")
    _restore_arguments(
        skip,
        "up to when the original ran, by the time of its ids, if that may be later than what the clocks here say: "
        "in ms since 1970, or as `coordlib ids inspect` shows it for the newest id there is",
    )


def _tx_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, text: str) -> argparse.ArgumentParser:
        description = text[0].upper() + text[1:] + "."
        sub = actions.add_parser(name, help=text, description=description, epilog=_ENVIRONMENT)
        _attach_arguments(sub)
        return sub

    listing = action("list", "the newest decisions that are remembered")
    listing.add_argument(
        "-n", dest="count", metavar="N", type=int, default=50, help="how many; by default 50"
    )
    listing.add_argument("--pending", action="store_true", help="only those that somebody has not obeyed yet")
    show = action("show", "all that is known of one transaction")
    doubt = action(
        "in-doubt",
        "what has not been obeyed, and what was ended by hand; 1 if people should look at it",
    )
    for sub in (listing, show, doubt):
        sub.add_argument("--json", action="store_true", help="as JSON")
    resolve = action("resolve", "abort what is not decided, or record what people did with a branch")
    which = resolve.add_mutually_exclusive_group(required=True)
    which.add_argument("--commit", dest="is_commit", action="store_true")
    which.add_argument("--abort", dest="is_commit", action="store_false")
    resolve.add_argument("--force", action="store_true", help="do it; without, say what it would do")
    forget = action("forget", "what was ended by hand and has been seen to")
    skip = action(
        "skip", "after a restore from back-up, presume nothing of what the original may have decided"
    )
    _restore_arguments(
        skip,
        "up to when the original ran, by its own clocks, if that may be later than what the clocks here say: in ms "
        "since 1970, or like 2026-01-31T23:59:59Z",
    )
    for sub in (resolve, forget):
        sub.add_argument("--branch", metavar="HEX", help="by default all that it is about")
    for sub in (show, resolve, forget):
        sub.add_argument(
            "transaction", metavar="ID", help="32 hexadecimal digits, or the name in pg_prepared_xacts"
        )


def _restore_arguments(parser: argparse.ArgumentParser, not_before: str) -> None:
    """What is confirmed after a restore from back-up."""
    parser.add_argument(
        "--original-is-stopped",
        action="store_true",
        help="confirms that no member and no application of the original runs any more",
    )
    parser.add_argument("--not-before", metavar="TIME", help=not_before)


def _attach_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="a member's file; its members are asked")
    parser.add_argument("--endpoint", metavar="ENDPOINT,...", help="of some members: tcp://10.0.0.1:7400")
    parser.add_argument("--cluster", help="the cluster's name")
    parser.add_argument("--secret-file", metavar="FILE", help="holds the secret")
    parser.add_argument("--timeout", metavar="SECONDS", type=float, default=3.0, help="by default 3")
