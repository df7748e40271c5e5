# SPDX-License-Identifier: Apache-2.0
"""Puts fastpref where TRL looks up its fused head, and takes it away again."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from .library import trl_release, trl_utils, trl_version
from .parts import DIVERGENCE, FIXABLE, Part, find_parts
from .reach import reach

logger = logging.getLogger("fastpref")

_in_force: list[Part] = []


def patch(*, fix_heads: bool = False) -> None:
    """Let TRL's fused head score on fastpref. Does nothing where it already does.

    Trainers made before count too, but for ``fix_heads``.

    Args:
        fix_heads: let TRL put fastpref's ``fuse_lm_head`` on models in place of its own head, for
            trainers made from then on: architectures whose logits are more than a product with the
            weight, and LoRA on the output head, which TRL refuses. Needs TRL 1.15 or newer.

    Raises:
        ImportError: TRL is missing or does not import.
        RuntimeError: this TRL is older than 1.13 (for ``fix_heads`` 1.15), or its fused head or its
            divergence is not one known here. TRL is left as it was.
    """
    found = find_parts(fix_heads=fix_heads)
    if not found:
        return
    _put(found)
    said = "; ".join(f"{what}: {which}" for what, which in _reach_of(_in_force).items())
    logger.info("TRL %s: the fused head now scores on fastpref. %s", trl_version(), said)


def would_reach() -> dict[str, str]:
    """What of the TRL that is installed scores on fastpref once it is patched, with
    ``fix_heads=True`` where there is such, and what does not. Patches nothing.

    Raises as ``patch`` does.
    """
    fix_heads = trl_release() >= FIXABLE
    return _reach_of([*_in_force, *find_parts(fix_heads=fix_heads)])


def _reach_of(parts: list[Part]) -> dict[str, str]:
    return reach(
        trl_release(),
        divergence=any(part.name == DIVERGENCE for part in parts),
        fix_heads=any(part.fixes_heads for part in parts),
    )


def unpatch() -> None:
    """Give TRL back what ``patch`` replaced. Does nothing where TRL is not patched.

    A model that ``fix_heads`` reached keeps the head it has.

    Raises:
        ImportError: TRL is missing or does not import.
    """
    trl_utils()
    _take_back(list(_in_force))


@contextlib.contextmanager
def patched(*, fix_heads: bool = False) -> Iterator[None]:
    """``with patched():`` TRL scores on fastpref, and afterwards on what it scored on before.

    ``fix_heads`` as in ``patch``; raises as it does.
    """
    before = list(_in_force)
    patch(fix_heads=fix_heads)
    try:
        yield
    finally:
        _take_back([part for part in _in_force if part not in before])
        _put([part for part in before if part not in _in_force])


def _put(parts: list[Part]) -> None:
    for part in parts:
        part.rebind(part.found, part.stand_in)
    _in_force.extend(parts)


def _take_back(parts: list[Part]) -> None:
    for part in reversed(parts):
        part.rebind(part.stand_in, part.found)
        _in_force.remove(part)
