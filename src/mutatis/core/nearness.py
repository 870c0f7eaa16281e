"""Nearness: what somebody may have meant by a name that nothing has, for messages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one that is most like a name; None if there are none.

    Example:
      >>> from mutatis.core.nearness import nearest
      >>> nearest("layers.0.kernel", ["layers[0].bias", "layers[0].kernel"])
      'layers[0].kernel'
    """
    return next(iter(difflib.get_close_matches(name, names, 1, 0.0)), None)


def mistyped(name: str, names: Iterable[str]) -> str | None:
    """The first of which a name is a slip: one letter is wrong, missing, superfluous or misplaced, or case and separators differ.

    What differs in digits is no slip (`layer1`, `layer2`), and neither is what is shorter than four letters.

    Example:
      >>> from mutatis.core.nearness import mistyped
      >>> [mistyped(name, ["params", "batch_stats", "group1"]) for name in ("parms", "BatchStats", "group2", "encoder")]
      ['params', 'batch_stats', None, None]
    """
    letters = _letters(name)
    return next((other for other in names if _is_slip(letters, _letters(other))), None)


def _letters(name: str) -> str:
    return re.sub(r"[\s_.-]", "", name).lower()


def _is_slip(name: str, other: str) -> bool:
    digits = [re.sub(r"\D", "", text) for text in (name, other)]
    if digits[0] != digits[1] or min(len(name), len(other)) < _SHORTEST or abs(len(name) - len(other)) > 1:
        return False
    return bool(_without_one(name) & _without_one(other))


def _without_one(text: str) -> set[str]:
    """A text, and what is left of it when one letter is taken out."""
    return {text, *(text[:at] + text[at + 1 :] for at in range(len(text)))}


_SHORTEST = 4  # letters
