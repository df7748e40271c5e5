# SPDX-License-Identifier: Apache-2.0
"""TRL, imported only when it is used, and which one it is."""

from __future__ import annotations

import importlib
import importlib.metadata
from types import ModuleType

UTILS = "trl.trainer.utils"
OLDEST = (1, 13)


def trl_module(name: str) -> ModuleType:
    """TRL's module of that name.

    Raises:
        ImportError: TRL is missing or does not import.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"fastpref.integrations.trl needs TRL {said(OLDEST)} or newer, and {name} does not "
            f'import ({error}); install it with: pip install "fastpref[trl]"'
        ) from error


def trl_utils() -> ModuleType:
    """The module with TRL's fused head."""
    return trl_module(UTILS)


def trl_version() -> str:
    """As installed."""
    return importlib.metadata.version("trl")


def trl_release() -> tuple[int, ...]:
    """(major, minor, ...) of it."""
    # packaging is there because TRL needs it.
    version = importlib.import_module("packaging.version").Version(trl_version())
    release: tuple[int, ...] = version.release
    return release


def said(release: tuple[int, ...]) -> str:
    """ "1.13" of (1, 13)."""
    return ".".join(map(str, release))
