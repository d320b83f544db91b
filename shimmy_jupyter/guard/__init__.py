"""What stands before every request: who may, how much, and the record of it."""
