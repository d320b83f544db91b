# nbval compares a cell's first output and does not follow its updates, so here answers come whole.
c = get_config()  # noqa: F821
c.ShimmyMagics.stream = False
