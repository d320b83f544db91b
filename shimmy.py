"""`%load_ext shimmy` and `import shimmy`: another name for `shimmy_jupyter`."""

from shimmy_jupyter import __version__, load_ipython_extension, unload_ipython_extension

__all__ = ["__version__", "load_ipython_extension", "unload_ipython_extension"]
