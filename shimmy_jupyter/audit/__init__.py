"""What was asked and what became of it: an append-only Merkle log in SQLite, and proofs from it."""
