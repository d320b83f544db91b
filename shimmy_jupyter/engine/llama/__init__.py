"""The backend on llama-cpp-python's low-level API, and the only room that knows `llama_cpp`."""

from .backend import LlamaBackend

__all__ = ["LlamaBackend"]
