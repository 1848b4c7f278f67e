"""The ids of prompts, against the `tokenizers` library on every code point and thousands of random texts."""
# covers: runtime/embed/src/tokenizer.cc, runtime/embed/src/clip.cc, runtime/embed/src/unicode.cc

from __future__ import annotations

import ctypes
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from engines.devices import parse_devices
from engines.store import Bundle
from runtime.call import Call
from runtime.embed import unicode
from runtime.embed.program import program_of, write_program
from tests.runtime.embed.building import built
from tests.runtime.embed.copies import altered_tokenizer
from tests.runtime.embed.library import Engine, Library, StatusError

WORDS = (
    *(
        "large",
        "red",
        "star",
        "circle's",
        "they're",
        "I'll",
        "we've",
        "12",
        "3.5",
        "x2",
        "...",
        "!?",
        "--",
        "'S",
        "''s",
    ),
    *("<|startoftext|>", "<|ENDOFTEXT|>", "<|endoftext|>", "\u00f1and\u00fa", "Stra\u00dfe", "\u0130stanbul"),
    *("\u03a3\u038a\u03a3\u03a5\u03a6\u039f\u03a3", "\ufb01n", "A\u030a", "\u00c5", "\uac01", "\u1100\u1161\u11a8"),
    *("e\u0301\u0327", "\u65e5\u672c\u8a9e", "\u0e44\u0e17\u0e22", "\u0928\u092e\u0938\u094d\u0924\u0947"),
    *("\U0001f3a8\U0001f469\u200d\U0001f467", "\u00bd", "\u00b2\u00b3", "\u2167", "\t", "\u00a0", "\u3000", "\u200b"),
)


@pytest.fixture(scope="module")
def engine(library: Library, shapes: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    path = tmp_path_factory.mktemp("words") / "one.program"
    write_program(program_of(shapes, parse_devices("cpu@1"), Call("", mode="sequential", num_inference_steps=1)), path)
    opened = library.open(shapes.folder, path)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def reference(shapes: Bundle) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer.from_file(str(shapes.folder / "tokenizer.json"))
    made.no_truncation()
    made.no_padding()
    return made


def expected(reference: tokenizers.Tokenizer, text: str, length: int) -> list[int]:
    ids = reference.encode(text).ids
    end = reference.token_to_id("<|endoftext|>")
    assert end is not None
    return [*ids[: length - 1], end] if len(ids) > length else ids + [end] * (length - len(ids))


def ids_of(file: Path, texts: list[str]) -> list[list[int]]:
    """All ids of texts by a tokenizer's file, uncut."""
    encoded = [text.encode() for text in texts]
    stream = b"".join(struct.pack("<I", len(one)) + one for one in encoded)
    run = subprocess.run([built("tests/check_tokenizer"), file], input=stream, capture_output=True, check=True)
    return [list(map(int, line.split())) for line in run.stdout.decode().splitlines()]


def test_thousands_of_random_texts(engine: Engine, reference: tokenizers.Tokenizer, rng: np.random.Generator) -> None:
    length = engine.sizes().token_count
    for _ in range(4000):
        kind = rng.integers(5)
        if kind == 0:
            text = " ".join(rng.choice(WORDS, rng.integers(0, 9)))
        elif kind == 1:
            text = "".join(rng.choice(WORDS, rng.integers(0, 9)))
        elif kind == 2:
            text = "".join(map(chr, rng.integers(1, 0x2000, rng.integers(1, 20))))
        elif kind == 3:  # letters with several marks: which of them compose depends on their classes and order
            marks = ["".join(map(chr, rng.integers(0x300, 0x370, rng.integers(1, 5)))) for _ in range(3)]
            text = "".join(
                letter + mark for letter, mark in zip(rng.choice([*"aeouAEO", "\u00e4"], 3), marks, strict=True)
            )
        else:
            codes = rng.integers(1, 0x110000, rng.integers(1, 12))
            text = "".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000)
        assert engine.tokenize(text) == expected(reference, text, length), ascii(text)


@pytest.mark.slow
def test_every_code_point(shapes: Bundle, reference: tokenizers.Tokenizer) -> None:
    """Beside letters, so that what joins a word, ends it or composes with it shows."""
    letters = [f"a{chr(code)}e " for code in unicode.CODES]
    texts = ["".join(letters[start : start + 200]) for start in range(0, len(letters), 200)]
    found = ids_of(shapes.folder / "tokenizer.json", texts)
    wanted = [encoding.ids for encoding in reference.encode_batch(texts)]
    assert len(found) == len(wanted)
    for text, own, ids in zip(texts, found, wanted, strict=True):
        assert own == ids, ascii(text)


@pytest.mark.slow
def test_the_tables_are_those_of_the_library(tmp_path: Path) -> None:
    assert unicode.tables() == unicode.TABLES.read_text()
    assert unicode.cluster_tables() == unicode.CLUSTERS.read_text()


def test_a_very_long_word_takes_no_time(engine: Engine, reference: tokenizers.Tokenizer) -> None:
    text = "abcdefgh" * 40_000
    assert engine.tokenize(text) == expected(reference, text, engine.sizes().token_count)


@pytest.mark.parametrize("text", [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"a\xf0\x9f", b"\xf4\x90\x80\x80"])
def test_text_that_is_not_utf8(engine: Engine, text: bytes) -> None:
    ids, count = np.zeros(64, np.int64), ctypes.c_size_t()
    with pytest.raises(StatusError, match="ARGUMENT: text is not UTF-8"):
        engine.library("tokenize", engine.handle, text, ids.ctypes.data, 64, ctypes.byref(count))


OTHERS: dict[str, dict[str, Any]] = {
    "normalizer": {"normalizer": {"type": "NFKC"}},
    "pre_tokenizer": {"pre_tokenizer": {"type": "Whitespace"}},
    "model is WordPiece": {"model": {"type": "WordPiece", "vocab": {}}},
    "post_processor": {"post_processor": None},
}


@pytest.mark.parametrize("part", OTHERS)
def test_another_kind_of_tokenizer_is_refused_by_the_part(
    shapes: Bundle, library: Library, tmp_path: Path, part: str
) -> None:
    """The engine opens all the same, says so in its log, and takes ids."""
    bundle, program = altered_tokenizer(shapes, tmp_path / "bundle", OTHERS[part])
    said: list[str] = []
    engine = library.open(bundle, program, "cpu@1", log=lambda _, text: said.append(text))
    with pytest.raises(StatusError, match="UNSUPPORTED") as caught:
        engine.tokenize("a star")
    assert part in caught.value.message and any(part in text for text in said)
    count = engine.sizes().token_count
    assert engine.generate([604] + [605] * (count - 1), negative=[605] * count).rgb.any()
    engine.close()


def test_merges_as_words_and_a_template(shapes: Bundle, library: Library, tmp_path: Path) -> None:
    """The forms that other versions of the libraries write."""

    def older(file: dict[str, object]) -> dict[str, object]:
        model = dict(file["model"])  # type: ignore[call-overload]
        model["merges"] = [" ".join(pair) for pair in model["merges"]]
        ends = {"<|startoftext|>": 604, "<|endoftext|>": 605}
        special = {name: {"id": name, "ids": [number], "tokens": [name]} for name, number in ends.items()}
        first, last = ({"SpecialToken": {"id": name, "type_id": 0}} for name in ends)
        single = [first, {"Sequence": {"id": "A", "type_id": 0}}, last]
        template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}
        return file | {"model": model, "post_processor": template}

    bundle, program = altered_tokenizer(shapes, tmp_path / "older", older)
    reference = tokenizers.Tokenizer.from_file(str(bundle / "tokenizer.json"))
    engine = library.open(bundle, program, "cpu@1")
    for text in ("", "a large red star", "Ünïcode <|endoftext|> x"):
        assert engine.tokenize(text) == expected(reference, text, engine.sizes().token_count)
    engine.close()
