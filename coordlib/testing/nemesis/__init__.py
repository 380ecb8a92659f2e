"""Real faults on real processes: `python -m coordlib.testing.nemesis`, `make nemesis`.

Applications with embedded members, and clients, work over real sockets and real files while this package kills,
pauses, cuts, fills, fails and cuts the power; every process writes a history of what it asked for and was
answered, and at the end everything is held against it. See docs/nemesis.md.

    application.py   the program that is run: works, writes its history, does as it is told on its standard input
    work.py          what it works at
    processes.py     one such process, from outside
    fleet.py         all of them: who leads, who has ended unasked
    network.py       what a network of theirs can do; netns.py and proxy.py do it
    disks.py         directories, or small filesystems that can be full and lose their power
    shim.py, shim.c  a library in front of libc: fsync that fails or is slow, a wall clock that jumps
    faults.py        each fault: applied, healed, and what was seen of it
    verdict.py       what was promised, held against what was noted and what every member has
    run.py           one run; __main__.py: the command
    workspace.py     what a run leaves in the machine, and how it is taken away again

What must not live here: anything that a simulated run needs; these are the only tests of coordlib that are not
repeatable from a seed, because the machine takes part.
"""
