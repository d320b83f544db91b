"""What models there are and which are in memory. Needs only `types` and `errors`."""
