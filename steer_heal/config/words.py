"""Text that users write: names that resemble each other, and characters that no text can hold."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# Surrogates are halves of a character; U+FFFE and the like are no characters in any text.
NONE = "".join(chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF))
UNUSABLE = re.compile(rf"[\0\b\ud800-\udfff\ufdd0-\ufdef{NONE}]")


def nearest(given: str, there: Iterable[str]) -> str:
    """A suggestion of the most similar name, or an empty string."""
    names = list(there)
    close = [name for name in names if name.rpartition(".")[2] == given] if given else []  # width for reg.width
    close = close or difflib.get_close_matches(given, names, n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""


def joined(text: str) -> str:
    """Join surrogate pairs, as JSON escapes emoji, into the characters that they stand for; lone surrogates stay."""
    if text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass" if _alone(text) else "strict")


def _alone(text: str) -> bool:
    return re.search(r"[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]", text) is not None


def unusable(text: str) -> str:
    """Name the first character that cannot be used in a text, and what to do; or an empty string."""
    found = UNUSABLE.search(text)
    if found is None:
        return ""
    code = ord(found[0])
    name = f"the character U+{code:04X} in {shortened(text, found.start())}"
    if found[0] == "\b":
        return rf"{name}: \b in double quotes is a backspace in YAML; write \\b, or use single quotes"
    if 0xD800 <= code < 0xE000:
        return f"{name}: half of a surrogate pair, or a byte that is not UTF-8; write the character itself"
    return f"{name}, which no text can hold"


def shortened(text: str, around: int = 0, width: int = 40) -> str:
    """Quote a text, in parts if it is long: what stands around a position."""
    begin = max(0, around - width // 2) if len(text) > width else 0
    part = text[begin : begin + width]
    return repr(f"{'...' if begin else ''}{part}{'...' if begin + width < len(text) else ''}")
