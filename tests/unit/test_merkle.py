"""The Merkle tree: known answers, and a recursive implementation as the RFC writes it.

Cases: the empty log, one leaf, the reference vectors of 1 to 8 leaves, and every size up to a few dozen.
Roots: by appending, by loading whole subtrees, of earlier sizes. Inclusion: every leaf of every size.
Consistency: every pair of sizes, none, itself. Refused: another leaf, index, size, root; a path with a
hash changed, left out, added, cut; sizes the wrong way round; hashes that are none.
What is stored: whole subtrees only, each once; how many are read for a proof.
"""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimmy_jupyter.audit.merkle import (
    EMPTY,
    Frontier,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    node_hash,
    root_of,
    verify_consistency,
    verify_inclusion,
)

# Inputs, roots and proofs of the Certificate Transparency project's own tests.
BODIES = [
    bytes.fromhex(text)
    for text in (
        "", "00", "10", "2021", "3031", "40414243", "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]  # fmt: skip
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
A = "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7"
B = "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e"
C = "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4"
D = "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b"
E = "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0"
F = "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a"
INCLUSION = {
    (0, 1): [],
    (0, 8): [A, B, C],
    (5, 8): [D, E, ROOTS[4]],
    (2, 3): [ROOTS[2]],
    (1, 5): [ROOTS[1], B, D],
}
CONSISTENCY = {(1, 1): [], (1, 8): [A, B, C], (6, 8): [F, E, ROOTS[4]], (2, 5): [B, D]}


# The definitions of RFC 9162, 2.1, as they stand there.


def split(n: int) -> int:
    k = 1
    while k * 2 < n:
        k *= 2
    return k


def mth(d: list[bytes]) -> bytes:
    if not d:
        return hashlib.sha256(b"").digest()
    if len(d) == 1:
        return hashlib.sha256(b"\0" + d[0]).digest()
    k = split(len(d))
    return hashlib.sha256(b"\1" + mth(d[:k]) + mth(d[k:])).digest()


def path(m: int, d: list[bytes]) -> list[bytes]:
    if len(d) == 1:
        return []
    k = split(len(d))
    if m < k:
        return [*path(m, d[:k]), mth(d[k:])]
    return [*path(m - k, d[k:]), mth(d[:k])]


def subproof(m: int, d: list[bytes], whole: bool) -> list[bytes]:
    if m == len(d):
        return [] if whole else [mth(d)]
    k = split(len(d))
    if m <= k:
        return [*subproof(m, d[:k], whole), mth(d[k:])]
    return [*subproof(m - k, d[k:], False), mth(d[:k])]


class Log:
    """Leaves and the whole subtrees above them, as whoever stores them has them."""

    def __init__(self, bodies: list[bytes]) -> None:
        self.frontier = Frontier()
        self.nodes: dict[tuple[int, int], bytes] = {}
        self.reads = 0
        for body in bodies:
            leaf = leaf_hash(body)
            self.nodes[0, self.frontier.size] = leaf
            for level, index, hash in self.frontier.append(leaf):
                assert (level, index) not in self.nodes
                self.nodes[level, index] = hash

    def node(self, level: int, index: int) -> bytes:
        self.reads += 1
        return self.nodes[level, index]


def some(size: int) -> list[bytes]:
    return [b"%d" % number for number in range(size)]


def test_known_roots() -> None:
    assert EMPTY.hex() == ROOTS[0]
    for size, root in enumerate(ROOTS):
        log = Log(BODIES[:size])
        assert log.frontier.root().hex() == root
        assert root_of(Log(BODIES).node, size).hex() == root


@pytest.mark.parametrize(("index", "size"), INCLUSION)
def test_known_inclusion(index: int, size: int) -> None:
    proof = inclusion_proof(Log(BODIES).node, index, size)
    assert [hash.hex() for hash in proof] == INCLUSION[index, size]
    root = bytes.fromhex(ROOTS[size])
    assert verify_inclusion(leaf_hash(BODIES[index]), index, size, proof, root)


@pytest.mark.parametrize(("old", "new"), CONSISTENCY)
def test_known_consistency(old: int, new: int) -> None:
    proof = consistency_proof(Log(BODIES).node, old, new)
    assert [hash.hex() for hash in proof] == CONSISTENCY[old, new]
    roots = [bytes.fromhex(root) for root in ROOTS]
    assert verify_consistency(old, roots[old], new, roots[new], proof)


def test_as_the_rfc_defines_it_at_every_size() -> None:
    bodies = some(40)
    log = Log(bodies)
    for size in range(1, len(bodies) + 1):
        root = mth(bodies[:size])
        assert Log(bodies[:size]).frontier.root() == root == root_of(log.node, size)
        for index in range(size):
            proof = inclusion_proof(log.node, index, size)
            assert proof == path(index, bodies[:size])
            assert verify_inclusion(leaf_hash(bodies[index]), index, size, proof, root)
        for old in range(1, size):
            proof = consistency_proof(log.node, old, size)
            assert proof == subproof(old, bodies[:size], True)
            assert verify_consistency(old, mth(bodies[:old]), size, root, proof)


@given(st.lists(st.binary(max_size=3), max_size=70), st.data())
def test_any_log(bodies: list[bytes], data: st.DataObject) -> None:
    size = len(bodies)
    log = Log(bodies)
    assert log.frontier.root() == mth(bodies)
    assert Frontier.load(size, log.node).root() == mth(bodies)
    old = data.draw(st.integers(0, size))
    proof = consistency_proof(log.node, old, size)
    assert verify_consistency(old, mth(bodies[:old]), size, mth(bodies), proof)
    more = Frontier.load(old, log.node)
    for body in bodies[old:]:
        more.append(leaf_hash(body))
    assert more.root() == mth(bodies)


@given(st.integers(1, 70), st.data())
def test_nothing_else_is_included(size: int, data: st.DataObject) -> None:
    bodies = some(size)
    root = mth(bodies)
    index = data.draw(st.integers(0, size - 1))
    leaf, proof = leaf_hash(bodies[index]), path(index, bodies)
    other = data.draw(st.integers(-2, size + 2).filter(lambda n: n != index))
    assert not verify_inclusion(leaf, other, size, proof, root)
    assert not verify_inclusion(leaf_hash(b"other"), index, size, proof, root)
    assert not verify_inclusion(leaf, index, size, proof, leaf_hash(b"root"))
    assert not verify_inclusion(leaf, index, size, [*proof, proof[0] if proof else leaf], root)
    if proof:
        at = data.draw(st.integers(0, len(proof) - 1))
        assert not verify_inclusion(leaf, index, size, proof[:at], root)
        without = proof[:at] + proof[at + 1 :]
        assert not verify_inclusion(leaf, index, size, without, root)
        changed = [*proof[:at], leaf_hash(b"x"), *proof[at + 1 :]]
        assert not verify_inclusion(leaf, index, size, changed, root)


@given(st.integers(2, 70), st.data())
def test_nothing_else_is_consistent(new: int, data: st.DataObject) -> None:
    bodies = some(new)
    old = data.draw(st.integers(1, new - 1))
    before, after, proof = mth(bodies[:old]), mth(bodies), subproof(old, bodies, True)
    assert not verify_consistency(old, leaf_hash(b"x"), new, after, proof)
    assert not verify_consistency(old, before, new, leaf_hash(b"x"), proof)
    assert not verify_consistency(new, after, old, before, proof)
    assert not verify_consistency(old, before, new, after, [*proof, before])
    assert not verify_consistency(old, before, new, after, [])
    at = data.draw(st.integers(0, len(proof) - 1))
    assert not verify_consistency(old, before, new, after, proof[:at])
    changed = [*proof[:at], leaf_hash(b"x"), *proof[at + 1 :]]
    assert not verify_consistency(old, before, new, after, changed)
    rewritten = [b"other", *bodies[1:]]
    assert not verify_consistency(old, before, new, mth(rewritten), subproof(old, rewritten, True))


def test_trivial_consistency() -> None:
    root = mth(some(5))
    assert verify_consistency(0, EMPTY, 5, root, [])
    assert verify_consistency(5, root, 5, root, [])
    assert not verify_consistency(0, root, 5, root, [])
    assert not verify_consistency(0, EMPTY, 5, root, [root])
    assert not verify_consistency(5, root, 5, EMPTY, [])
    assert not verify_consistency(5, root, 5, root, [root])
    assert not verify_consistency(-1, EMPTY, 5, root, [])


def test_what_is_no_hash_is_refused() -> None:
    """Bytes that move from one neighbour to the other would give the same node."""
    left, right = leaf_hash(b"l"), leaf_hash(b"r")
    root = node_hash(left, right)
    assert verify_inclusion(left, 0, 2, [right], root)
    assert not verify_inclusion(left + right[:1], 0, 2, [right[1:]], root)
    assert not verify_consistency(1, left + right[:1], 2, root, [right[1:]])


@pytest.mark.parametrize(("index", "size"), [(0, 0), (-1, 3), (3, 3)])
def test_no_proof_of_what_is_not_there(index: int, size: int) -> None:
    with pytest.raises(ValueError, match="no leaf"):
        inclusion_proof(Log(some(8)).node, index, size)


@pytest.mark.parametrize(("old", "new"), [(-1, 3), (4, 3)])
def test_no_proof_of_what_does_not_continue(old: int, new: int) -> None:
    with pytest.raises(ValueError, match="does not continue"):
        consistency_proof(Log(some(8)).node, old, new)


def test_a_frontier_has_the_right_number_of_peaks() -> None:
    with pytest.raises(ValueError, match="3 leaves make 2 whole subtrees"):
        Frontier(3, [EMPTY])


def test_little_is_kept_and_read() -> None:
    log = Log(some(1023))
    assert len(log.nodes) - 1023 == 1023 - (1023).bit_count()
    log.reads = 0
    inclusion_proof(log.node, 511, 1023)
    consistency_proof(log.node, 700, 1023)
    assert log.reads < 60
