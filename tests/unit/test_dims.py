"""Shape suffixes in the code against the legend in docs/dims.md."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUFFIX = re.compile(r"^_?[a-z][a-z0-9_]*_([A-Z]+)$")


def _legend() -> set[str]:
    text = (ROOT / "docs" / "dims.md").read_text(encoding="utf-8")
    letters = set(re.findall(r"^\| `([A-Z])` \|", text, re.MULTILINE))
    assert len(letters) > 15
    return letters


def _suffixes(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
    return {match[1] for name in names if (match := SUFFIX.match(name))}


def test_every_suffix_is_made_of_letters_of_the_legend() -> None:
    legend, seen = _legend(), set()
    for path in sorted((ROOT / "longer_rec").rglob("*.py")):
        for suffix in _suffixes(path.read_text(encoding="utf-8")):
            assert set(suffix) <= legend, f"{path.relative_to(ROOT)}: suffix _{suffix} has letters not in docs/dims.md"
            seen |= set(suffix)
    assert len(seen) > 10


def test_a_letter_outside_the_legend_is_found() -> None:
    assert _suffixes("event_TD = merge(x.length_BZ)") == {"TD", "BZ"}
    assert "Z" not in _legend()
    assert not _suffixes("MAX_AGE_S = ID_BITS + T")
