"""Components by file name: ``objectives/mae.py`` is the objective "mae". No registry is edited.

A component module holds exactly one ``Config`` (a frozen pydantic model) and one class that subclasses the folder's
interface. Listing imports nothing; only the component that is asked for is imported.
"""

import difflib
import importlib
import pkgutil
from types import ModuleType
from typing import TypeVar

from pipeline.core.errors import ConfigError

T = TypeVar("T")


def names(package: str) -> list[str]:
    """Names of the components in ``package`` ("pipeline.objectives"), sorted, without importing any of them."""
    parent = importlib.import_module(package)
    return sorted(m.name for m in pkgutil.iter_modules(parent.__path__) if not m.name.startswith("_"))


def suggest(word: str, known: list[str]) -> str:
    """`` (did you mean 'x'?)`` for the nearest of ``known``, or the whole list when nothing is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else "there are: " + ", ".join(known)


def module(package: str, name: str) -> ModuleType:
    """Import component ``name`` of ``package``.

    Raises:
        ConfigError: no such file; the message names the nearest one.
    """
    known = names(package)
    if name not in known:
        kind = package.rsplit(".", 1)[-1].rstrip("s")
        raise ConfigError(f"unknown {kind} {name!r}; {suggest(name, known)}")
    return importlib.import_module(f"{package}.{name}")


def component(package: str, name: str, interface: type[T]) -> type[T]:
    """The one public class in component ``name`` that subclasses ``interface`` and is defined in that file."""
    mod = module(package, name)
    found = [
        value
        for value in vars(mod).values()
        if isinstance(value, type) and value.__module__ == mod.__name__ and issubclass(value, interface)
    ]
    assert len(found) == 1, f"{mod.__name__} must define exactly one {interface.__name__}, found {found}"
    return found[0]
