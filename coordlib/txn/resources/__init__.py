"""Databases, and other people's transactions, as resources of ours.

Each needs a driver that its user has anyway; nothing is imported before it is asked for::

    PostgreSQL   psycopg 3, blocking and asynchronous     coordlib[postgresql]
    MariaDB      PyMySQL                                  coordlib[mariadb]
    SQLite       the standard library's; decides itself
    SQLAlchemy   sessions and connections with two phases coordlib[sqlalchemy], and a driver from above
    zope         the `transaction` package, both ways     coordlib[zope]

What they have in common: `open(cluster)` says at once what is wrong with a database or its settings, `begin` and
`enlist` make branches, and the contract of `coordlib.txn.branches` says the rest. What must not live here: who
decides, and when.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from coordlib.txn.resources.mariadb import MariaDB
    from coordlib.txn.resources.postgresql import PostgreSQL
    from coordlib.txn.resources.sqlalchemy import SQLAlchemy
    from coordlib.txn.resources.sqlite import SQLite

__all__ = ["MariaDB", "PostgreSQL", "SQLAlchemy", "SQLite"]

_MODULES: Final = {
    "MariaDB": "mariadb",
    "PostgreSQL": "postgresql",
    "SQLAlchemy": "sqlalchemy",
    "SQLite": "sqlite",
}


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{module}"), name)
