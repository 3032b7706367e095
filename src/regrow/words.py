"""Put text of others into messages, short, on one line and harmless; offer names for misspelt ones."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

LONGEST = 1000
"""Characters of a message."""

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = _SHORT.maxset = _SHORT.maxfrozenset = 4


def shown(value: Any) -> str:
    """A value as Python writes it; long ones are shortened."""
    try:
        return one_line(_SHORT.repr(value), 200)
    except ValueError:
        # Python does not write numbers of more than 4300 digits.
        return "a number of thousands of digits"


def one_line(text: str, longest: int = LONGEST) -> str:
    """Make text of others safe to print: no line breaks, no control characters, no half characters.

    Args:
        text: any.
        longest: characters that are kept; of a longer text the middle is left out.
    """
    safe = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in _cut(text, longest))
    return _cut(safe, longest)


def _cut(text: str, longest: int) -> str:
    """A text, without its middle if it is longer."""
    head, tail = longest * 2 // 3, longest // 3 - 5
    return text if len(text) <= longest else f"{text[:head]} ... {text[-tail:]}"


def offer(name: Any, known: Iterable[str]) -> str:
    """What to say of a name that is not known: ``"; did you mean 'dato'?"``, or nothing."""
    names = {one.lower(): one for one in known if one != name}
    given = name[:100].lower() if isinstance(name, str) else ""
    # difflib finds exchanged letters of a short name unlike.
    exchanged = [one for one in names if sorted(one) == sorted(given)]
    close = exchanged or difflib.get_close_matches(given, names, n=1)
    return f"; did you mean {names[close[0]]!r}?" if close else ""
