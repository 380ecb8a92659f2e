"""
Pre-fork workers, as gunicorn or Celery start them: every worker attaches after the fork, without a vote.

A handle belongs to the process that started it. A worker that inherits one gets ForkedError and makes its
own by `coordlib.connect`. Set COORDLIB_ENDPOINTS, COORDLIB_CLUSTER and COORDLIB_SECRET to those of your cluster.
"""

import os
import sys

import coordlib

WORKERS = 3
ROUNDS = 5


def work(number: int) -> None:
    with coordlib.connect(
        os.environ["COORDLIB_ENDPOINTS"],
        cluster=os.environ["COORDLIB_CLUSTER"],
        secret=os.environ["COORDLIB_SECRET"],
        name=f"worker-{number}",
    ) as cluster:
        served = cluster.map("served")
        for _ in range(ROUNDS):
            with cluster.lock("served", timeout=10) as grant:
                served.put("count", served.get("count", 0) + 1, guard=grant)


def main() -> int:
    children = []
    for number in range(WORKERS):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                work(number)
                status = 0
            finally:
                os._exit(status)
        children.append(pid)
    failed = [pid for pid in children if os.waitpid(pid, 0)[1] != 0]
    print(f"{WORKERS - len(failed)} of {WORKERS} workers did {ROUNDS} rounds each")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
