"""The tree of RFC 9162 (hashing as in RFC 6962): its root, and proofs of what is in it.

Leaves are numbered from 0. A node is named by its level and its place in the level: node (l, i) is over
the 2^l leaves from i * 2^l on, all of which are there; leaves are level 0. Such nodes never change as
the log grows, so whoever stores them can prove anything with a few dozen reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

EMPTY = hashlib.sha256().digest()
"""The root of a log without leaves."""

Node = Callable[[int, int], bytes]
"""From level and index, the hash of a whole subtree."""


def leaf_hash(body: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + body).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


class Frontier:
    """What of a log is needed to add to it: the roots of its whole subtrees, the largest first."""

    __slots__ = ("_peaks", "size")

    def __init__(self, size: int = 0, peaks: Sequence[bytes] = ()) -> None:
        if len(peaks) != size.bit_count():
            raise ValueError(f"{size} leaves make {size.bit_count()} whole subtrees")
        self.size = size
        self._peaks = list(peaks)

    @classmethod
    def load(cls, size: int, node: Node) -> Frontier:
        return cls(size, [node(level, index) for level, index in _whole(0, size)])

    def append(self, leaf: bytes) -> list[tuple[int, int, bytes]]:
        """The nodes above leaves that are whole by it: level, index, hash."""
        made = []
        level, index = 0, self.size
        while index & 1:
            leaf = node_hash(self._peaks.pop(), leaf)
            level, index = level + 1, index >> 1
            made.append((level, index, leaf))
        self._peaks.append(leaf)
        self.size += 1
        return made

    def root(self) -> bytes:
        return _joined(self._peaks) if self._peaks else EMPTY


def inclusion_proof(node: Node, index: int, size: int) -> list[bytes]:
    """The hashes that lead from leaf `index` to the root of the first `size` leaves, from below."""
    if not 0 <= index < size:
        raise ValueError(f"there is no leaf {index} among {size}")
    path = []
    low, high = 0, size
    while high - low > 1:
        middle = low + _split(high - low)
        if index < middle:
            path.append(_subtree(node, middle, high))
            high = middle
        else:
            path.append(_subtree(node, low, middle))
            low = middle
    return path[::-1]


def verify_inclusion(
    leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes
) -> bool:
    """Whether `leaf` is number `index` of the log of that size and root (RFC 9162, 2.1.3.2)."""
    if not 0 <= index < size or not _sound(path):
        return False
    place, last, found = index, size - 1, leaf
    for hash in path:
        if last == 0:
            return False
        if place & 1 or place == last:
            found = node_hash(hash, found)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            found = node_hash(found, hash)
        place, last = place >> 1, last >> 1
    return last == 0 and found == root


def consistency_proof(node: Node, old: int, new: int) -> list[bytes]:
    """The hashes that show the first `old` of `new` leaves to be the same as ever. None are needed
    where `old` is 0, or is `new`.
    """
    if not 0 <= old <= new:
        raise ValueError(f"a log of {new} leaves does not continue one of {old}")
    if old in {0, new}:
        return []
    path = []
    low, high, known = 0, new, True
    while high != old:
        middle = low + _split(high - low)
        if old <= middle:
            path.append(_subtree(node, middle, high))
            high = middle
        else:
            path.append(_subtree(node, low, middle))
            low, known = middle, False
    if not known:
        path.append(_subtree(node, low, high))
    return path[::-1]


def verify_consistency(
    old: int, old_root: bytes, new: int, new_root: bytes, path: Sequence[bytes]
) -> bool:
    """Whether the log of `new` leaves begins with that of `old` leaves (RFC 9162, 2.1.4.2)."""
    if not 0 <= old <= new or not _sound(path):
        return False
    if old == 0:
        return old_root == EMPTY and not path
    if old == new:
        return old_root == new_root and not path
    hashes = list(path) if old & (old - 1) else [old_root, *path]
    if not hashes:
        return False
    place, last = old - 1, new - 1
    while place & 1:
        place, last = place >> 1, last >> 1
    before = after = hashes[0]
    for hash in hashes[1:]:
        if last == 0:
            return False
        if place & 1 or place == last:
            before, after = node_hash(hash, before), node_hash(hash, after)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            after = node_hash(after, hash)
        place, last = place >> 1, last >> 1
    return last == 0 and before == old_root and after == new_root


def root_of(node: Node, size: int) -> bytes:
    """Of the first `size` leaves."""
    return _subtree(node, 0, size) if size else EMPTY


def _sound(path: Sequence[bytes]) -> bool:
    return all(len(hash) == len(EMPTY) for hash in path)


def _split(size: int) -> int:
    """The largest power of two below it."""
    return 1 << (size - 1).bit_length() - 1


def _whole(low: int, high: int) -> list[tuple[int, int]]:
    """The whole subtrees that a range is made of; it begins where one as large as it could."""
    found = []
    while low < high:
        level = (high - low).bit_length() - 1
        found.append((level, low >> level))
        low += 1 << level
    return found


def _subtree(node: Node, low: int, high: int) -> bytes:
    return _joined([node(level, index) for level, index in _whole(low, high)])


def _joined(peaks: Sequence[bytes]) -> bytes:
    found = peaks[-1]
    for hash in reversed(peaks[:-1]):
        found = node_hash(hash, found)
    return found
