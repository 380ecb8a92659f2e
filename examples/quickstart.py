"""The shortest program that holds a lock and writes under it. Needs nothing but coordlib."""

import coordlib


def main() -> None:
    with coordlib.local() as cluster:  # in production: coordlib.Cluster.from_env()
        rates = cluster.map("rates")
        with cluster.lock("rates-update", timeout=5) as grant:
            rates.put("eur", 1.09, guard=grant)  # refused if the lock is no longer ours
            print(f"wrote under fencing token {grant.token}")
        print(f"eur = {rates['eur']}")


if __name__ == "__main__":
    main()
