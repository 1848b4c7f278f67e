"""`python -m runtime.embed.unicode`: writes `src/unicode_tables.inc`, what the C++ tokenizer knows of Unicode.

Every entry is asked of the `tokenizers` library itself, so that the two agree whatever version of Unicode its crates
have; only the values of combining classes come from Python, and each of them is checked.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, normalizers, pre_tokenizers

from runtime.embed.building import SOURCE

TABLES = SOURCE / "src" / "unicode_tables.inc"
CODES = [code for code in range(1, 0x110000) if not 0xD800 <= code < 0xE000]
LAST_CLASS = "\u0345"  # combining class 240: any other mark moves in front of it
HANGUL = range(0xAC00, 0xAC00 + 11172)  # composed by arithmetic


def ranges(codes: Iterable[int]) -> list[tuple[int, int]]:
    """Neighbouring code points as (first, last)."""
    found: list[tuple[int, int]] = []
    for code in codes:
        if found and found[-1][1] == code - 1:
            found[-1] = found[-1][0], code
        else:
            found.append((code, code))
    return found


def matching(pattern: str) -> list[int]:
    """The code points that a regular expression of the library matches: all that it cuts out of one long text."""
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    found = []
    for start in range(0, len(CODES), 4096):
        part = CODES[start : start + 4096]
        cut = {a for _, (a, b) in split.pre_tokenize_str("".join(map(chr, part))) if b - a == 1}
        # neighbours that do not match stay together; a lone one is told apart by asking for itself
        found += [part[a] for a in sorted(cut) if split_matches(pattern, chr(part[a]))]
    return found


def split_matches(pattern: str, character: str) -> bool:
    """Whether a character matches by itself."""
    removed = pre_tokenizers.Split(Regex(pattern), "removed")
    return not removed.pre_tokenize_str(character)


def lowercase() -> list[tuple[int, int, int]]:
    """(code, lower, second of lower or 0)."""
    lower, found = normalizers.Lowercase(), []
    for code in CODES:
        made = lower.normalize_str(chr(code))
        if made != chr(code):
            assert 1 <= len(made) <= 2, hex(code)
            found.append((code, ord(made[0]), ord(made[1]) if len(made) > 1 else 0))
    return found


def decompositions() -> tuple[list[tuple[int, int, int, int, int]], list[tuple[int, int, int]]]:
    """(code, up to four parts) in full, and (first, second, composed)."""
    apart, together = normalizers.NFD(), normalizers.NFC()
    parts, pairs = [], []
    for code in CODES:
        made = apart.normalize_str(chr(code))
        if made == chr(code) or code in HANGUL:
            continue
        assert len(made) <= 4, hex(code)
        parts.append((code, *(ord(made[n]) if n < len(made) else 0 for n in range(4))))
        first = [int(word, 16) for word in unicodedata.decomposition(chr(code)).split()]
        if len(first) == 2 and together.normalize_str("".join(map(chr, first))) == chr(code):
            pairs.append((first[0], first[1], code))
    return parts, sorted(pairs)  # type: ignore[return-value]


def combining() -> list[tuple[int, int]]:
    """(code, class) of the marks that have one."""
    apart, found = normalizers.NFD(), []
    for code in CODES:
        alone = apart.normalize_str(chr(code))
        moved = apart.normalize_str(f"a{LAST_CLASS}{chr(code)}") == f"a{alone}{LAST_CLASS}" and chr(code) != LAST_CLASS
        if moved or chr(code) == LAST_CLASS:
            value = unicodedata.combining(chr(code))
            assert value or len(alone) > 1, f"{code:x} has a class that this Python does not know"
            if value:
                found.append((code, value))
    return found


def table(name: str, kind: str, rows: Sequence[tuple[int, ...]]) -> str:
    """One array."""
    words = ["{" + ", ".join(f"0x{number:x}" if number else "0" for number in row) + "}" for row in rows]
    lines, line = [], ""
    for word in words:
        if len(line) + len(word) > 115:
            lines.append(line)
            line = ""
        line += f"{word}, "
    body = "\n".join(f"    {one.rstrip()}" for one in (*lines, line))
    return f"const {kind} {name}[] = {{\n{body}\n}};\n"


def tables() -> str:
    """The file."""
    parts, pairs = decompositions()
    return "\n".join(
        [
            "// Made by `python -m runtime.embed.unicode` from the `tokenizers` library; do not edit.\n",
            table("LETTERS", "Range", ranges(matching(r"\p{L}"))),
            table("NUMBERS", "Range", ranges(matching(r"\p{N}"))),
            table("SPACES", "Range", ranges(matching(r"\s"))),
            table("LOWER", "Lower", lowercase()),
            table("PARTS", "Parts", parts),
            table("PAIRS", "Pair", pairs),
            table("CLASSES", "Class", combining()),
        ]
    )


def main(path: Path = TABLES) -> None:
    """Writes the file."""
    path.write_text(tables())


if __name__ == "__main__":
    main()
