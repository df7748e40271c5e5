# SPDX-License-Identifier: Apache-2.0
"""Which tokens a policy credits, after "From r to Q*" (arXiv:2404.12358), as a picture.

The credit of a token is ``fastpref.sequences.token_credit``: beta (log policy - log ref), in the
paper's token-level reading r_t + V(s_t+1) - V(s_t). Of the paper it is this quantity; not its
search by the same sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch


def credit_map(
    tokens: Sequence[str], credit: Any, path: str | Path, *, title: str = ""
) -> tuple[Path, Path]:
    """A response coloured by the credit of its tokens, blue where it is positive and red where it
    is negative, the strongest colour at the largest size: ``path`` with .html, each number shown
    under the pointer, and with .png, in which letters that matplotlib's font lacks are boxes. Needs
    matplotlib.

    Args:
        tokens: T texts, as ``tokenizer.decode`` gives one id at a time.
        credit: (T,), a tensor or numbers, such as a row of ``token_credit``.
        path: where they go, without suffix or with either of the two.
        title: above them.

    Returns:
        The two paths, HTML and PNG.

    Raises:
        ValueError, TypeError: where texts and numbers do not belong together.
        ImportError: matplotlib is not installed.
    """
    from .pages import credit_page
    from .pictures import draw_credit

    numbers = checked(tokens, credit)
    for name, value, kinds in (("path", path, (str, PathLike)), ("title", title, (str,))):
        if not isinstance(value, kinds):
            raise TypeError(f"{name} must be a text, got {type(value).__name__}")
    base = Path(path)
    if not base.parent.is_dir():
        raise ValueError(f"path must lie in a folder that exists, got {base}; make it before")
    if base.suffix in (".html", ".png"):
        base = base.with_suffix("")
    page, picture = (base.with_name(base.name + end) for end in (".html", ".png"))
    page.write_text(credit_page(tokens, numbers, title), encoding="utf-8")
    draw_credit(tokens, numbers, picture, title)
    return page, picture


def checked(tokens: Any, credit: Any) -> list[float]:
    """``credit`` as numbers, one for each of ``tokens``."""
    texts = isinstance(tokens, Sequence) and not isinstance(tokens, str)
    if not texts or not all(isinstance(one, str) for one in tokens):
        raise TypeError(
            f"tokens must be a list of texts, one for each token, got {type(tokens).__name__}; "
            "make it with [tokenizer.decode([one]) for one in ids]"
        )
    try:
        numbers = torch.as_tensor(credit, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"credit must be a tensor or numbers, got {type(credit).__name__}; take a row of "
            "token_credit"
        ) from None
    if numbers.shape != (len(tokens),) or not len(tokens):
        raise ValueError(
            f"credit must be one number for each of {len(tokens)} tokens, at least one, got "
            f"{tuple(numbers.shape)}"
        )
    if not numbers.isfinite().all():
        raise ValueError("credit must be finite, got an infinity or NaN among it")
    found: list[float] = numbers.tolist()
    return found
