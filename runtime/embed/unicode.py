"""`python -m runtime.embed.unicode`: writes `src/*_tables.inc`, what the C++ tokenizer knows of Unicode.

Every entry is asked of the `tokenizers` library itself, so that the two agree whatever version of Unicode its crates
have; only the values of combining classes come from Python, and each of them is checked.
"""

from __future__ import annotations

import struct
import unicodedata
from collections.abc import Callable, Iterable, Sequence

from tokenizers import Regex, normalizers, pre_tokenizers

from runtime.embed.building import SOURCE

TABLES = SOURCE / "src" / "unicode_tables.inc"
CLUSTERS = SOURCE / "src" / "cluster_tables.inc"
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


def double_array(entries: dict[bytes, int]) -> bytes:
    """A trie of bytes as darts-clone lays it out and the Precompiled normalizer reads it, built for any few entries.

    Each unit is a u32: label in bits 0 to 7, bit 8 that an entry ends here, offset to the children from bit 10 on.
    """
    children: dict[bytes, set[int]] = {b"": set()}
    for key in entries:
        for size, byte in enumerate(key):
            children.setdefault(key[:size], set()).add(byte)
            children.setdefault(key[: size + 1], set())
    units, bases = {0: 0}, {b"": 0}
    for key in sorted(children, key=len):
        own = bases[key]
        labels = sorted(children[key]) + ([0] if key in entries else [])
        if not labels:
            continue
        offset = 256 * (max(units) // 256 + 1) | own & 255  # a block of its own: own ^ offset has no low bits
        base = own ^ offset
        units[own] |= offset << 10 | (key in entries) << 8
        for label in labels:
            units[base ^ label] = label
            bases[key + bytes([label])] = base ^ label
        if key in entries:
            units[base] = 1 << 31 | entries[key]
    array = [units.get(at, 0) for at in range(256 * (max(units) // 256 + 1))]
    return struct.pack(f"<I{len(array)}I", 4 * len(array), *array)


def cluster_size() -> Callable[..., int]:
    """A function of code points that counts what the library replaces in them: whole clusters of at most five bytes,
    and each code point of longer ones. That is all of UAX #29 that the normalizer shows."""
    charsmap = double_array({bytes([byte]): 0 for byte in range(1, 256)}) + b"X\0"
    normalizer = normalizers.Precompiled(charsmap)
    return lambda *codes: len(normalizer.normalize_str("".join(map(chr, codes))))


def breaks() -> list[tuple[int, int, str]]:
    """(first, last, kind) for `src/clusters.cc`, asked of the library by texts in which only a cluster's end differs.

    A grave accent after a character of three bytes makes a short cluster, counted as one; in a longer one both count.
    """
    count = cluster_size()
    mark, acute, joiner, sun, ka, virama = 0x300, 0x301, 0x200D, 0x2600, 0x915, 0x94D
    lead, vowel, tail = 0x1100, 0x1161, 0x11A8
    found: dict[int, str] = {}
    for code in CODES:
        follows = count(ord("a"), code) == 1
        if count(code, ord("a")) == 1:
            found[code] = "Prepend"
        elif follows and count(ka, code, ka, mark) == 4:
            found[code] = "Linker"
        elif follows:
            found[code] = "Extend" if count(sun, code, joiner, sun, mark) == 5 else "Spacing"
        elif count(code, mark, acute) == 2:
            found[code] = "Control"
        elif count(code, joiner, sun, mark) == 4:
            found[code] = "Pictograph"
        elif count(code, virama, ka, mark) == 4:
            found[code] = "Consonant"
        elif code not in HANGUL:
            before = [count(code, jamo, mark) == 3 for jamo in (lead, vowel, tail)]
            kinds = {(True, True, False): "L", (False, True, True): "V", (False, False, True): "T"}
            if any(before):
                found[code] = kinds[before[0], before[1], before[2]]
    return [
        (first, last, kind)
        for kind in sorted(set(found.values()))
        for first, last in ranges(code for code in CODES if found.get(code) == kind)
    ]


def table(name: str, kind: str, rows: Sequence[tuple[int | str, ...]]) -> str:
    """One array. Texts in a row stand as they are."""
    words = ["{" + ", ".join(n if isinstance(n, str) else f"0x{n:x}" if n else "0" for n in row) + "}" for row in rows]
    lines, line = [], ""
    for word in words:
        if len(line) + len(word) > 115:
            lines.append(line)
            line = ""
        line += f"{word}, "
    body = "\n".join(f"    {one.rstrip()}" for one in (*lines, line))
    return f"const {kind} {name}[] = {{\n{body}\n}};\n"


MADE = "// Made by `python -m runtime.embed.unicode` from the `tokenizers` library; do not edit.\n"


def cluster_tables() -> str:
    """The file of grapheme clusters."""
    return f"{MADE}\n" + table(
        "BREAKS", "Break", sorted((first, last, f"Kind::{kind}") for first, last, kind in breaks())
    )


def tables() -> str:
    """The file of normalization and classes."""
    parts, pairs = decompositions()
    return "\n".join(
        [
            MADE,
            table("LETTERS", "Range", ranges(matching(r"\p{L}"))),
            table("NUMBERS", "Range", ranges(matching(r"\p{N}"))),
            table("SPACES", "Range", ranges(matching(r"\s"))),
            table("LOWER", "Lower", lowercase()),
            table("PARTS", "Parts", parts),
            table("PAIRS", "Pair", pairs),
            table("CLASSES", "Class", combining()),
        ]
    )


def main() -> None:
    """Writes the files."""
    TABLES.write_text(tables())
    CLUSTERS.write_text(cluster_tables())


if __name__ == "__main__":
    main()
