"""Standard output, for people: tables as wide as their terminal, and nothing that could command it."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

console = Console(highlight=False)
if not console.is_terminal:
    console = Console(highlight=False, width=120)  # a file or a pipe has no width of its own


def printable(text: str) -> Text:
    """A model's output as it may be shown: no markup is read in it, no control character reaches the terminal."""
    return Text("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text))
