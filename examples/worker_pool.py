"""
A pool of worker processes that mint ids: each attaches for itself, and gets a worker number of its own.

What multiprocessing, gunicorn or Celery fork must not use the parent's generator (it raises ForkedError): each
process calls `coordlib.connect`, and no id comes twice, whichever process minted it. The first process of each
generation is killed as soon as it has minted; the next ones go on with other numbers.

Set COORDLIB_ENDPOINTS, COORDLIB_CLUSTER and COORDLIB_SECRET to those of your cluster.
"""

import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import Connection

import coordlib

GENERATIONS = 2
WORKERS = 4
ORDERS = 10_000


def work(is_killed: bool, results: Connection) -> None:
    cluster = coordlib.connect(
        os.environ["COORDLIB_ENDPOINTS"],
        cluster=os.environ["COORDLIB_CLUSTER"],
        secret=os.environ["COORDLIB_SECRET"],
    )
    with cluster:
        ids = cluster.ids("orders")
        singly = [ids.mint() for _ in range(ORDERS)]
        together = list(ids.mint_many(ORDERS))  # for a bulk insert: costs as much as a few single ones
        results.send((ids.worker, singly + together))
        if is_killed:
            os.kill(
                os.getpid(), signal.SIGKILL
            )  # gives nothing back: its number is free again in ten seconds


def main() -> int:
    fork = multiprocessing.get_context("fork")
    numbers: list[int] = []
    minted: list[int] = []
    for _ in range(GENERATIONS):
        pool = []
        for place in range(WORKERS):
            receiver, sender = fork.Pipe(duplex=False)
            process = fork.Process(target=work, args=(place == 0, sender))
            process.start()
            sender.close()
            pool.append((process, receiver))
        for process, receiver in pool:
            number, block = receiver.recv()
            numbers.append(number)
            minted += block
            process.join()
    double = len(minted) - len(set(minted))
    print(f"{len(numbers)} processes had the worker numbers {', '.join(map(str, numbers))}")
    print(f"{len(minted)} ids, {double} of them double")
    return 1 if double else 0


if __name__ == "__main__":
    sys.exit(main())
