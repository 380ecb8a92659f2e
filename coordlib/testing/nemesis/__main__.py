"""Real faults on real processes: run, print what was done and seen, and say whether a promise was broken.

Exit codes: 0 all held; 1 something did not, and the evidence is kept where the last lines say; 2 it could not be
run as asked: wrong arguments, or a capability of the machine is missing with --require all; 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from coordlib.testing.nemesis import capabilities
from coordlib.testing.nemesis.disks import DiskError
from coordlib.testing.nemesis.faults import FAULTS
from coordlib.testing.nemesis.run import NO_FSYNC, OWN_SABOTAGES, Outcome, Settings, run
from coordlib.testing.nemesis.work import SABOTAGES
from coordlib.testing.nemesis.workspace import CommandError, Workspace, own_mounts

__all__ = ["main"]

EXIT_BROKEN = 1
EXIT_NOT_RUN = 2
EXIT_INTERRUPTED = 130
VIOLATIONS_SHOWN = 20


class _NotRun(Exception):
    """It cannot be run as asked; the message says why."""


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m coordlib.testing.nemesis",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="faults:\n" + "\n".join(f"  {one.name:<15} {one.what}" for one in FAULTS.values()),
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="of trouble, in each run")
    parser.add_argument("--members", type=int, default=3, choices=(3, 5))
    parser.add_argument(
        "--faults", default="", help="comma between them; default: all that this machine can do"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of faults; 0: a new one")
    parser.add_argument(
        "--runs", type=int, default=1, help="one after another, with seeds that follow each other"
    )
    parser.add_argument("--network", choices=("auto", "netns", "proxy"), default="auto")
    parser.add_argument("--require", choices=("all",), help="fail if this machine cannot do all of it")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="on a disk, not in memory")
    parser.add_argument("--sabotage", default="", help=argparse.SUPPRESS)
    return parser


def _chosen(text: str, known: Sequence[str], what: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in known:
            raise _NotRun(f"unknown {what} {name!r}; known are {', '.join(known)}")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as asked; returns the exit code."""
    options = _parser().parse_args(arguments)
    own_mounts()
    try:
        # Closing the workspace takes away whatever an interrupted run could not.
        with Workspace(options.dir) as workspace:
            return asyncio.run(_main(options, workspace))
    except _NotRun as error:
        _say(f"nemesis: {error}")
        return EXIT_NOT_RUN
    except (CommandError, DiskError, OSError) as error:
        _say(f"nemesis: the machine does not play along: {error}")
        return EXIT_NOT_RUN
    except asyncio.CancelledError:
        _say("nemesis: interrupted")
        return EXIT_INTERRUPTED


async def _main(options: argparse.Namespace, workspace: Workspace) -> int:
    task = asyncio.current_task()
    assert task is not None
    for stopping in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(stopping, task.cancel)
    asked = _chosen(options.faults, list(FAULTS), "fault")
    sabotage = _chosen(options.sabotage, [*SABOTAGES, *OWN_SABOTAGES], "sabotage")
    network = options.network
    is_required = options.require == "all" or os.environ.get("COORDLIB_REQUIRE_FAULTS") == "1"
    wanted = [
        what
        for what in capabilities.ALL
        if is_required
        or (what == capabilities.NAMESPACES and network != "proxy")
        or (what == capabilities.SHIM and NO_FSYNC in sabotage)
        or what in {FAULTS[name].needs for name in asked or FAULTS}
    ]
    missing = {what: why for what, why in (await capabilities.find(workspace, wanted)).items() if why}
    if network == "auto":
        network = "proxy" if capabilities.NAMESPACES in missing else "netns"
    for what, why in missing.items():
        _say(f"this machine cannot do {what}: {why}")
    if is_required and missing:
        raise _NotRun("all of it was required")
    if network == "netns" and capabilities.NAMESPACES in missing:
        raise _NotRun(f"--network netns: {missing[capabilities.NAMESPACES]}")
    possible = [name for name, fault in FAULTS.items() if fault.needs not in missing]
    for name in asked or FAULTS:
        if name not in possible:
            _say(f"fault {name} is left out: it needs {FAULTS[name].needs}")
    if asked and not set(asked) & set(possible):
        raise _NotRun("no fault is left")
    seed = options.seed or random.SystemRandom().randrange(1, 1 << 31)
    broken = 0
    for number in range(options.runs):
        settings = Settings(
            members=options.members,
            seconds=options.minutes * 60,
            seed=seed + number,
            faults=[name for name in possible if not asked or name in asked],
            network=network,
            capabilities=frozenset(set(wanted) - set(missing)),
            sabotage=tuple(sabotage),
        )
        outcome = await run(settings, workspace)
        _tell(settings, outcome)
        run_directory = workspace.directory / f"run-{settings.seed}"
        if outcome.violations:
            broken += 1
            _say(f"evidence: {_keep(run_directory, options.dir)}")
        shutil.rmtree(run_directory, ignore_errors=True)
    if options.runs > 1:
        _say(f"{options.runs} runs, {broken} with violations")
    return EXIT_BROKEN if broken else 0


def _tell(settings: Settings, outcome: Outcome) -> None:
    _say(
        f"seed {settings.seed}, {settings.members} members, 2 clients, network {settings.network}: "
        f"{outcome.seconds:.0f} s, {outcome.leaders} leaders"
    )
    for line in outcome.lines():
        _say(f"  {line}")
    _say("  " + ", ".join(f"{count} {what}" for what, count in outcome.counts.items()))
    _say(
        "  errors met: " + (", ".join(f"{n} {kind}" for kind, n in sorted(outcome.errors.items())) or "none")
    )
    for violation in outcome.violations[:VIOLATIONS_SHOWN]:
        _say(f"VIOLATION: {violation}")
    _say(f"  {len(outcome.violations)} violations")


def _keep(directory: Path, parent: Path) -> Path:
    """Move the evidence of a run to where no later run takes it away."""
    for number in range(1, 10_000):
        target = parent / f"coordlib-nemesis-evidence-{number}"
        if not target.exists():
            break
    leftovers = shutil.ignore_patterns("disk.img", "disk", "shim.so", "*.shim")
    shutil.copytree(directory, target, ignore=leftovers)
    return target


if __name__ == "__main__":
    sys.exit(main())
