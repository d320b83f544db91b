"""The ledger's tables.

A record's columns but for `seq`, `leaf_hash` and `body` are computed from its body, so that none of them
can say anything else than what was hashed.
"""

from __future__ import annotations

import functools
import sqlite3

from .merkle import EMPTY, Frontier, Node
from .writer import StoreFailed

VERSION = 1
COLUMNS = ("timestamp", "user", "kind", "model", "outcome", "action", "request_id")
_COMPUTED = ",\n".join(
    f"  {name} TEXT GENERATED ALWAYS AS (json_extract(body, '$.{name}')) VIRTUAL"
    for name in COLUMNS
)

SCHEMA = f"""
CREATE TABLE IF NOT EXISTS records (
  seq INTEGER PRIMARY KEY,
  leaf_hash BLOB NOT NULL,
  body TEXT,
{_COMPUTED}
);
CREATE INDEX IF NOT EXISTS by_timestamp ON records (timestamp);
CREATE INDEX IF NOT EXISTS by_user ON records (user);
CREATE INDEX IF NOT EXISTS by_model ON records (model);
CREATE INDEX IF NOT EXISTS by_request ON records (request_id);
CREATE INDEX IF NOT EXISTS by_outcome ON records (outcome) WHERE outcome IS NOT NULL;
CREATE INDEX IF NOT EXISTS by_action ON records (action) WHERE action IS NOT NULL;
CREATE TABLE IF NOT EXISTS nodes (
  level INTEGER NOT NULL,
  idx INTEGER NOT NULL,
  hash BLOB NOT NULL,
  PRIMARY KEY (level, idx)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS head (
  one INTEGER PRIMARY KEY CHECK (one = 1),
  size INTEGER NOT NULL,
  root BLOB NOT NULL,
  timestamp TEXT NOT NULL
);
INSERT OR IGNORE INTO head SELECT 1, 0, x'{EMPTY.hex()}', ''
  WHERE NOT EXISTS (SELECT 1 FROM records)
"""  # noqa: S608  names of ours
"""Safe to run again. `nodes` are the whole subtrees above the leaves, as in `merkle`."""


def damaged(what: str) -> StoreFailed:
    return StoreFailed(f"the ledger is damaged: {what}; `shimmy audit verify` says where")


def node_in(connection: sqlite3.Connection) -> Node:
    """The hashes that a proof needs, out of the file."""

    def node(level: int, index: int) -> bytes:
        if level:
            row = connection.execute(
                "SELECT hash FROM nodes WHERE level = ? AND idx = ?", (level, index)
            ).fetchone()
        else:
            row = connection.execute(
                "SELECT leaf_hash FROM records WHERE seq = ?", (index,)
            ).fetchone()
        if row is None or not isinstance(row[0], bytes):
            raise damaged(f"there is no hash over records from {index << level} on")
        return row[0]

    return node


def read_head(connection: sqlite3.Connection) -> tuple[int, bytes, str]:
    """Size, root and timestamp."""
    row = connection.execute("SELECT size, root, timestamp FROM head").fetchone()
    if row is None or [type(value) for value in row] != [int, bytes, str] or row[0] < 0:
        raise damaged("it has no head")
    size, root, timestamp = row
    return size, root, timestamp


def load_frontier(connection: sqlite3.Connection) -> Frontier:
    """Of all records, whoever wrote them."""
    size, root, _ = read_head(connection)
    frontier = Frontier.load(size, node_in(connection))
    if frontier.root() != root:
        raise damaged("its head is not that of its records")
    return frontier


@functools.cache
def expected_schema() -> frozenset[tuple[str, str, str]]:
    """What a sound ledger has, and nothing else: kind, name and definition."""
    connection = sqlite3.connect(":memory:")
    try:
        connection.executescript(SCHEMA)
        return schema_of(connection)
    finally:
        connection.close()


def schema_of(connection: sqlite3.Connection) -> frozenset[tuple[str, str, str]]:
    rows = connection.execute(
        "SELECT type, name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"
    )
    return frozenset((str(kind), str(name), str(sql)) for kind, name, sql in rows)
