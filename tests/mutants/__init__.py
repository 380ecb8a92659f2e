"""Deliberate defects, planted one at a time to see who catches them: the test of the tests.

Each stands for a bug that somebody shipped. `python -m tests.mutants` runs the simulator over a tree with one of them
in it, the core's own `invariant()` calls switched off, until something outside notices. What nobody notices is a
hole in the simulator. The table of the last run is docs/planted-bugs.md.
"""
