"""The ids of T5's prompts, against the `tokenizers` library with random pieces, replacements and texts."""
# covers: runtime/embed/src/unigram.cc, runtime/embed/src/clusters.cc, runtime/embed/src/json.cc

from __future__ import annotations

import base64
import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from engines.store import Bundle
from runtime.embed import unicode
from tests.runtime.embed.copies import altered_tokenizer
from tests.runtime.embed.library import Library, StatusError
from tests.runtime.embed.test_tokenizer import WORDS, ids_of

MARK = "\u2581"
JOINING = [0xA9, 0xAE, 0x200C, 0x200D, 0x2600, 0x1F469, 0x300, 0x301, 0xFE0F, 0x903, 0x600, 0x1100, 0x1161, 0x11A8]
JOINING += [0xAC00, 0xAC01, 0x915, 0x937, 0x94D, 0x1F1E6, 0x0D, 0x0A, 0x61, 0xE9, 0x0E33, 0x1F3FB]


def charsmap(rng: np.random.Generator) -> bytes:
    """Replacements as SentencePiece's `nmt_nfkc` has them, of some code points, and some that no rules would give."""
    texts, entries = bytearray(), dict[bytes, int]()
    compatible = [c for c in map(chr, unicode.CODES[:0x2FFFF]) if unicodedata.normalize("NFKC", c) != c]
    for character in rng.choice(compatible, 60):
        entries[unicodedata.normalize("NFD", character).encode()] = 0
        entries[character.encode()] = 0
    wanted = {key: unicodedata.normalize("NFKC", key.decode()) for key in entries}
    for codes in rng.choice(JOINING, (25, 2)):
        wanted["".join(map(chr, codes)).encode()] = str(rng.choice(["", " ", "x", MARK, "\u0301", "two words"]))
    for code in rng.choice(JOINING, 6):
        wanted[chr(code).encode()] = str(rng.choice(["", " ", "y", "\u0301"]))
    for key, text in wanted.items():
        entries[key] = len(texts)
        texts += text.encode() + b"\0"
    return unicode.double_array(entries) + bytes(texts)


def t5(rng: np.random.Generator, converted: bool) -> tokenizers.Tokenizer:
    """A tokenizer of random pieces, as transformers makes T5's, or as it converted it from SentencePiece's file."""
    letters = [*"abcdefgstyx", "\u00e9", "\u65e5", "\U0001f3a8", MARK, "\u0301"]
    pieces = {"".join(rng.choice(letters, rng.integers(1, 5))) for _ in range(400)} | set(WORDS) | {MARK, "<unk>", "b"}
    scores = np.round(rng.uniform(-12, 0, len(pieces)), int(rng.integers(1, 9)))
    scores += rng.choice([0.0, 40.0])  # where scores are high, unknown characters can be better than a piece
    vocabulary = [("<pad>", 40.0), ("</s>", 40.0), *zip(sorted(pieces), map(float, scores), strict=True)]
    vocabulary.append(vocabulary[5])  # of a piece that is there twice the second counts
    names = [name for name, _ in vocabulary]
    made = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=names.index("<unk>"), byte_fallback=False))
    precompiled, marks = normalizers.Precompiled(charsmap(rng)), pre_tokenizers.Metaspace(MARK, "always")
    if converted:
        runs = normalizers.Replace(tokenizers.Regex(" {2,}"), MARK)
        strip = normalizers.Strip(left=bool(rng.integers(2)), right=bool(rng.integers(2)))
        made.normalizer = normalizers.Sequence([precompiled, strip, runs])
        made.pre_tokenizer = marks
    else:
        made.normalizer = precompiled
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), marks])
    made.add_special_tokens(["<pad>", "</s>", tokenizers.AddedToken("<extra_id_0>", lstrip=True, rstrip=converted)])
    made.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    return made


def some_text(rng: np.random.Generator) -> str:
    kind = rng.integers(5)
    if kind == 0:
        return " ".join(rng.choice([*WORDS, "<extra_id_0>", "</s>", " ", "  ", MARK], rng.integers(0, 9)))
    if kind == 1:
        return "".join(rng.choice([*"abcdefgstyxz ", MARK, " </s>", "<extra_id_0> ", "<unk>"], rng.integers(0, 30)))
    if kind == 2:
        return "".join(map(chr, rng.choice(JOINING, rng.integers(1, 16))))
    if kind == 3:
        return "".join(map(chr, rng.integers(1, 0x3000, rng.integers(1, 20))))
    return "".join(chr(c) for c in rng.integers(1, 0x110000, rng.integers(1, 12)) if not 0xD800 <= c < 0xE000)


@pytest.mark.parametrize("converted", [False, True])
def test_random_pieces_and_texts(tmp_path: Path, rng: np.random.Generator, converted: bool) -> None:
    for turn in range(3):
        reference = t5(rng, converted)
        file = tmp_path / f"{turn}.json"
        reference.save(str(file))
        texts = [some_text(rng) for _ in range(3000)]
        for text, own in zip(texts, ids_of(file, texts), strict=True):
            assert own == reference.encode(text).ids, ascii(text)


@pytest.mark.slow
def test_clusters_of_code_points(tmp_path: Path, rng: np.random.Generator) -> None:
    """All marks and every tenth of the others, between letters, marks, jamo, pictures, consonants and their joiners.

    A short cluster is replaced as one, and of a long one each code point.
    """
    entries = {bytes([byte]): 0 for byte in range(1, 256)}
    reference = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("X", -1.0)], unk_id=0, byte_fallback=False))
    reference.normalizer = normalizers.Precompiled(unicode.double_array(entries) + b"X\0")
    reference.pre_tokenizer = pre_tokenizers.Metaspace(MARK, "always")
    reference.post_processor = processors.TemplateProcessing(single=["$A"], special_tokens=[])
    reference.save(str(tmp_path / "clusters.json"))
    around = [("a", ""), ("\u00a9\u200d", "\u0300"), ("\u0915\u094d", "\u0300"), ("\u1100", "\u0300")]
    around += [("", "\u0300\u0301"), ("", "\u200d\u2600\u0300"), ("", "\u094d\u0915\u0300"), ("", "\u1161\u0300")]
    around += [("\u2600", "\u200d\u2600\u0300"), ("\u0915", "\u0915\u0300"), ("\u1161", "\u0300"), ("", "\u11a8\u0300")]
    around += [("\u0915", "\u094d\u0915\u0300"), ("\u11a8", "\u0300")]
    some = [c for c in unicode.CODES[:0x32000] if unicodedata.category(chr(c))[0] == "M" or rng.random() < 0.1]
    texts = [f"{before}{chr(code)}{behind}" for code in some for before, behind in around]
    wanted = [encoding.ids for encoding in reference.encode_batch(texts)]
    for text, own, ids in zip(texts, ids_of(tmp_path / "clusters.json", texts), wanted, strict=True):
        assert own == ids, ascii(text)


def test_a_very_long_word_takes_no_time(tmp_path: Path, rng: np.random.Generator) -> None:
    reference = t5(rng, False)
    reference.save(str(tmp_path / "long.json"))
    text = "abcdefgh" * 40_000
    assert ids_of(tmp_path / "long.json", [text])[0] == reference.encode(text).ids


def file_of(reference: tokenizers.Tokenizer) -> dict[str, Any]:
    file: dict[str, Any] = json.loads(reference.to_str())
    return file


def test_an_engine_with_it(shapes: Bundle, library: Library, tmp_path: Path, rng: np.random.Generator) -> None:
    """Cut and padded as the program says."""
    reference = t5(rng, False)
    bundle, program = altered_tokenizer(shapes, tmp_path / "bundle", file_of(reference))
    engine = library.open(bundle, program, "cpu@1")
    length = engine.sizes().token_count
    for text in ("", "a large red star", "abc " * 100):
        ids = reference.encode(text).ids
        ids = [*ids[: length - 1], 605] if len(ids) > length else ids + [605] * (length - len(ids))
        assert engine.tokenize(text) == ids
    assert engine.generate("a star").rgb.any()
    engine.close()


EVERY = {bytes([byte]): 5 for byte in range(1, 256)}
DAMAGE = {
    "no base64": b"",
    "cut off": b"\x10\0\0\0abcd",
    "no trie": b"\0\0\0\0",
    "texts that are not UTF-8": unicode.double_array({b"a": 0}) + b"\xff\0",
    "out of the trie": b"\x04\0\0\0\0\xff\xff\xff",
    "out of the texts": unicode.double_array(EVERY) + b"X\0",
    "inside a character": unicode.double_array({b"a": 1}) + "\u00e9\0".encode(),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_table(shapes: Bundle, library: Library, tmp_path: Path, rng: np.random.Generator, case: str) -> None:
    """An error with words when the engine opens, or when a prompt comes upon it."""
    table = base64.b64encode(DAMAGE[case]).decode() or "a*=="
    file = file_of(t5(rng, False)) | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": table}}
    bundle, program = altered_tokenizer(shapes, tmp_path / "bundle", file)
    with pytest.raises(StatusError, match="BUNDLE: the tokenizer's precompiled_charsmap is damaged"):
        library.open(bundle, program, "cpu@1").tokenize("a star")


OTHERS: dict[str, dict[str, Any]] = {
    "normalizer": {"normalizer": {"type": "NFKC"}},
    "pre_tokenizer": {"pre_tokenizer": {"type": "Metaspace", "replacement": MARK, "prepend_scheme": "first"}},
    "model": {"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0]], "byte_fallback": False}},
    "post_processor": {"post_processor": None},
    "several vectors": {
        "added_tokens": [
            {
                "id": n,
                "content": name,
                "special": True,
                "single_word": False,
                "normalized": False,
                "lstrip": False,
                "rstrip": False,
            }
            for n, name in enumerate(("<cat>", "<cat>_1"))
        ]
    },
}


@pytest.mark.parametrize("part", OTHERS)
def test_what_is_not_t5s_is_refused_by_the_part(
    shapes: Bundle, library: Library, tmp_path: Path, rng: np.random.Generator, part: str
) -> None:
    bundle, program = altered_tokenizer(shapes, tmp_path / "bundle", file_of(t5(rng, False)) | OTHERS[part])
    engine = library.open(bundle, program, "cpu@1")
    with pytest.raises(StatusError, match=f"UNSUPPORTED: .*{part}"):
        engine.tokenize("a star")
    engine.close()
