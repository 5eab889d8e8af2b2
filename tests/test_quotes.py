"""Commands that users copy: brackets are in quotes, since zsh expands them, and `~` at the head of an argument too."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHOWN = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("conf/**/*.yaml"), ROOT / "Makefile"]
SETTING = r"[\w./@{}]+=\["  # path=[
BARE = re.compile(rf"(?<![\w./@{{}}'\"(+]){SETTING}(?!\])|(?<=\s)~[a-z_]+\.[a-z_]+")


def sentences(path: Path) -> Iterator[str]:
    """The texts in a module, its docstrings aside; values in f-strings are x."""
    tree = ast.parse(path.read_text("utf-8"))
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    inside |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "x" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.value


def test_what_is_unquoted_is_found() -> None:
    assert BARE.search("python -m steer_heal.main filter=[length]")
    assert BARE.search("add ~dose.alpha")
    assert not BARE.search("main 'filter=[length]' '~dose.alpha'")
    assert not BARE.search("""STEER_HEAL_SLURM_SETUP='["module"]'""")


def test_pages_and_help_quote_brackets() -> None:
    bare = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in SHOWN
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if BARE.search(line)
    ]
    assert not bare, "zsh expands brackets that are not in quotes:\n" + "\n".join(bare)


def test_messages_quote_brackets() -> None:
    """Two texts are none: what `quoted` puts into quotes, and an argument of `compose`."""
    bare = [
        f"{path.relative_to(ROOT)}: {text}"
        for folder in ("steer_heal", "hydra_plugins")
        for path in (ROOT / folder).rglob("*.py")
        for text in sentences(path)
        if BARE.search(text) and text not in ("x=[x]", "hydra.searchpath=[x]")
    ]
    assert not bare, "zsh expands brackets that are not in quotes:\n" + "\n".join(bare)
