"""Packages that only some commands need, installed by name: pip install 'graftlm[plot]'."""

from collections.abc import Iterator
from contextlib import contextmanager


def how_to_install(extra: str) -> str:
    """The command for an installed package and for a clone, which only the user can tell apart."""
    return f"pip install 'graftlm[{extra}]', or pip install -e '.[{extra}]' in a clone"


@contextmanager
def needs(extra: str, purpose: str) -> Iterator[None]:
    """Within the block a package that is not installed is a ValueError that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{purpose} needs {(error.name or extra).partition('.')[0]}; run {how_to_install(extra)}"
        ) from None
