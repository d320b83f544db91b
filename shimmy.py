"""`%load_ext shimmy` and `import shimmy`: another name for `shimmy_jupyter`."""

from typing import Any

import shimmy_jupyter
from shimmy_jupyter import API, __version__, load_ipython_extension, unload_ipython_extension

__all__ = ["__version__", "load_ipython_extension", "unload_ipython_extension", *API]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in API:  # past `shimmy_jupyter.models`, which is a package of its own
        from shimmy_jupyter import api

        return getattr(api, name)
    return getattr(shimmy_jupyter, name)


def __dir__() -> list[str]:
    return sorted(__all__)
