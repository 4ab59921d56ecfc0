"""What a user names as `module:attribute`, on the command line say."""

import importlib
from typing import Any

from schuss.bounds import nearest


def named(name: str) -> Any:
    """The attribute of a module that `name`, as `module:attribute`, stands for.

    Raises:
        ValueError: the module cannot be imported, whatever runs in it, or has no such attribute; in one line.
    """
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever runs when it is imported
        raise ValueError(f"cannot import {module!r}: {type(error).__name__}: {first_line(error)}") from error
    try:
        return getattr(found, attribute)
    except AttributeError:
        public = [name for name in vars(found) if not name.startswith("_")]
        raise ValueError(f"module {module!r} has no {attribute!r}: {nearest(attribute, public)}") from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error).partition("\n")[0]
