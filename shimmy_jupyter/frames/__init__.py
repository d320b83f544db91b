"""`df.shimmy` on every frame of pandas and polars, as soon as these are there, whoever imports them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .fill import Wiring

NAME = "shimmy"
_REGISTER = {
    "pandas": ("register_dataframe_accessor", "register_series_accessor"),
    "polars": ("register_dataframe_namespace", "register_series_namespace"),
}


def register(wiring: Callable[[], Wiring]) -> None:
    """Have frames answered by this; `wiring` is asked at each call. Imports neither library: one that is
    there gets its accessors now, and another when somebody imports it. Doing it again replaces the wiring.
    """
    from .fill import connect

    connect(wiring)
    for name in _REGISTER:
        module = sys.modules.get(name)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            _attach(name, module)
    if not any(isinstance(one, _AfterImport) for one in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def unregister() -> None:
    """Take it all out again. Doing it twice is fine."""
    from .fill import connect

    connect(None)
    sys.meta_path[:] = [one for one in sys.meta_path if not isinstance(one, _AfterImport)]
    for name in _REGISTER:
        for kind in ("DataFrame", "Series"):
            cls = getattr(sys.modules.get(name), kind, None)
            if _is_ours(cls):
                delattr(cls, NAME)
                cls._accessors.discard(NAME)  # type: ignore[union-attr]


def last() -> Any:
    """The frame of the latest call, as far as it came, if that was interrupted or failed; else None."""
    from .fill import last

    return last()


def clear_cache() -> int:
    """Forget all answers of rows; returns how many they were. Raises `InvalidValue` where that cannot be."""
    from .cache import Cache
    from .fill import connected

    folder = connected().folder
    if folder is None:
        return 0
    cache = Cache(folder)
    try:
        return cache.clear()
    finally:
        cache.close()


def _attach(name: str, module: ModuleType) -> None:
    from .accessor import FrameAccessor, SeriesAccessor

    place = module.api.extensions if name == "pandas" else module.api
    both = zip(
        ("DataFrame", "Series"), (FrameAccessor, SeriesAccessor), _REGISTER[name], strict=True
    )
    for kind, accessor, function in both:
        if not _is_ours(getattr(module, kind)):
            getattr(place, function)(NAME)(accessor)


def _is_ours(cls: type | None) -> bool:
    return getattr(getattr(cls, NAME, None), "__module__", "").startswith(__name__)


class _AfterImport(MetaPathFinder):
    """Finds nothing itself: what the others find gets a loader that attaches the accessors afterwards."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _REGISTER:
            return None
        others = (one for one in sys.meta_path if one is not self and hasattr(one, "find_spec"))
        found = (one.find_spec(name, path, target) for one in others)
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        # Whoever only looks for the library asks its loader for sources and data files.
        if name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # As if nothing had stood between: resources are looked for by the loader.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        try:
            _attach(module.__name__, module)
        except Exception as error:  # noqa: BLE001  an import of somebody's must not fail by us
            said = f"{module.__name__} has no .{NAME}: {type(error).__name__}: {error}"
            warnings.warn(said, RuntimeWarning, stacklevel=2)
