"""For all layers: pytest-jupyter's server fixtures, which also run `async def` tests."""

pytest_plugins = ["pytest_jupyter.jupyter_server"]
