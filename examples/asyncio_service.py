"""
An asyncio service: many tasks share one cluster handle, and a decorated coroutine runs one at a time.

Without configuration it runs on a cluster of its own; with COORDLIB_* variables it is a member of yours.
"""

import asyncio
import os

import coordlib


async def main() -> None:
    configured = "COORDLIB_CLUSTER" in os.environ
    cluster = coordlib.AsyncCluster.from_env() if configured else coordlib.AsyncCluster.local()
    async with cluster:
        stock = cluster.map("stock")
        await stock.put("apples", 100)

        @cluster.locked("stock-apples", timeout=10)
        async def take(count: int) -> int:
            left = await stock.get("apples") - count
            await stock.put("apples", left)
            return int(left)

        left = await asyncio.gather(*(take(2) for _ in range(20)))
        print(f"20 orders of 2 apples: {min(left)} of 100 left")

        try:
            async with cluster.lock("stock-apples"):
                # Somebody else wants it meanwhile: waiting ends in time, and cleanly.
                await cluster.lock("stock-apples").acquire(timeout=0.05)
        except coordlib.LockTimeout as error:
            print(f"as expected: {error}")


if __name__ == "__main__":
    asyncio.run(main())
