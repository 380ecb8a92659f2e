"""Two-phase commit: who takes part, what is decided, and how it is finished whoever fails.

The decision is one entry of the log (`machine/transactions.py`); here is everything around it, as generators that
yield requests and the application's own I/O. What must not live here: threads, tasks, sockets and clocks.
"""
