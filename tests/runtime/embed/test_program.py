"""Program files: what is in them, what is refused, and two readers that reject the same damaged files."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.devices import parse_devices
from engines.errors import BundleError, ParameterError
from engines.store import Bundle
from runtime import __main__ as runtime_command
from runtime.call import Call
from runtime.embed import layout
from runtime.embed.layout import ENTRY, HEADER, SECTIONS, ProgramError, ProgramFile, sealed, unpack
from runtime.embed.program import PARAMETERS, UNPLAYED, program_of
from runtime.pipeline import Pipeline
from tests.runtime.embed.building import built
from tests.runtime.embed.conftest import Write


def program(shapes: Bundle, devices: str = "cpu*2", **options: Any) -> ProgramFile:
    given: dict[str, Any] = {"mode": "aggressive", "k": 2, "num_inference_steps": 6} | options
    return program_of(shapes, parse_devices(devices), Call("", **given))


def verdicts(files: list[bytes], variant: str = "plain") -> list[str]:
    """What the C++ reader says of each: OK or the name of a status."""
    stream = b"".join(struct.pack("<I", len(one)) + one for one in files)
    reader = built("tests/check_program", variant)
    run = subprocess.run([reader], input=stream, capture_output=True, check=True)
    return [line.split()[0] for line in run.stdout.decode().splitlines()]


def verdict(content: bytes) -> str:
    """The same of the Python reader."""
    try:
        unpack(content)
    except ProgramError as error:
        return error.code
    return "OK"


def resealed(content: bytes) -> bytes:
    """With the checksum that belongs to it, so that what comes after the checksum is reached."""
    return sealed(layout.VERSION, content[HEADER.size :])


def place(content: bytes, rng: np.random.Generator) -> int:
    """Where a file is damaged: every section as often as another, however small, and the table of sections, too."""
    number = int(rng.integers(len(SECTIONS) + 1))
    start, size = HEADER.size, ENTRY.size * len(SECTIONS)
    if number:
        _, record, start, count = ENTRY.unpack_from(content, HEADER.size + ENTRY.size * (number - 1))
        size = record * count
    return start + int(rng.integers(max(size, 1)))


def mutations(content: bytes, rng: np.random.Generator, count: int) -> Iterator[bytes]:
    """Files with flipped bits, other numbers, parts left out, doubled or exchanged; most with a fitting checksum."""
    extremes = [0, 1, 2, 3, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1]
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(int(rng.integers(1, 4))):
            at = min(place(content, rng), len(changed) - 8)
            kind = rng.integers(6)
            if kind == 0:
                changed[at] ^= 1 << int(rng.integers(8))
            elif kind == 1:
                struct.pack_into("<I", changed, at & ~3, extremes[rng.integers(len(extremes))])
            elif kind == 2:
                old = struct.unpack_from("<I", changed, at & ~3)[0]
                struct.pack_into("<I", changed, at & ~3, (old + int(rng.integers(-3, 4))) % 2**32)
            elif kind == 3:
                struct.pack_into("<d", changed, at & ~7, float(rng.choice([np.nan, np.inf, -1.0, 1e308])))
            elif kind == 4:
                size = int(rng.integers(1, 64)) * 4
                changed[at : at + size] = b"" if rng.integers(2) else changed[at : at + size] * 2
            else:
                other = min(place(content, rng), len(changed) - 8)
                changed[at : at + 4], changed[other : other + 4] = changed[other : other + 4], changed[at : at + 4]
        yield resealed(bytes(changed)) if rng.integers(8) else bytes(changed)


def test_a_file_comes_back_as_it_was(shapes: Bundle) -> None:
    made = program(shapes, mode="conservative", scheduler="euler_a", k=3)
    read = unpack(made.pack())
    for one in dataclasses.fields(ProgramFile):
        assert list(getattr(read, one.name)) == list(getattr(made, one.name)), one.name


def test_what_a_program_says(shapes: Bundle) -> None:
    made = program(shapes, scheduler="euler_a", width=48, height=96, guidance_scale=2.5, clip_skip=1)
    model, manifest = made.model, shapes.manifest
    texts = [made.string(offset) for offset in (model.model, model.scheduler, model.mode, model.drafts)]
    assert texts == ["shapes", "euler_a", "aggressive", "corrected"]
    assert (model.width, model.height, model.latent_height, model.latent_width) == (48, 96, 24, 12)
    assert (model.steps, model.k, model.guidance, model.clip_skip, model.lanes) == (6, 2, 2.5, 1, 2)
    noise = [(made.string(slot.name), slot.number) for slot in made.slots if slot.kind == layout.NOISE_SLOT]
    assert noise == [(f"fresh {step}", step + 1) for step in range(5)]  # the last step ends without noise
    files = {made.string(one.name): one for one in made.files}
    for network in ("text_encoder", "denoiser", "vae_decoder"):
        spec = manifest.networks[network].file
        assert (files[spec.name].sha256.hex(), files[spec.name].size) == (spec.sha256, spec.bytes)
    compiled = [name for name, one in files.items() if one.kind == layout.COMPILED]
    for name in compiled:
        assert hashlib.sha256((shapes.folder / name).read_bytes()).digest() == files[name].sha256
    assert len(compiled) == 3


@pytest.mark.parametrize(
    "options", [{"mode": "adaptive"}, {"mode": "srds", "tolerance": 0.1}, {"mode": "speculative", "scheduler": "ddpm"}]
)
def test_what_measures_is_refused_by_name(shapes: Bundle, options: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=f"{options['mode']} decides by what it measures"):
        program(shapes, **options)


def test_parameters_of_a_call_are_refused(shapes: Bundle, pipeline: Pipeline, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "prompt": "a star", "negative_prompt": "a ring", "seed": 1, "num_images_per_prompt": 2, "lanes": 1,
        "priority": 1, "timeline": True, "strength": 0.5, "cache_interval": 2,
    }  # fmt: skip
    array = np.zeros((1, 4, 16, 16), np.float32)
    for name in (*PARAMETERS, *UNPLAYED):
        call = Call(**{"prompt": "", "mode": "sequential", name: values.get(name, array)})
        with pytest.raises(ParameterError, match=f"{name} is .* leave it out"):
            program_of(shapes, parse_devices("cpu*2"), call)
    with pytest.raises(ParameterError, match="callbacks"):
        pipeline.program(tmp_path / "x", mode="sequential", progress=lambda finished, steps: None)
    with pytest.raises(ParameterError, match="name the mode"):
        pipeline.program(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_model_for_gpus_alone_is_refused(shapes: Bundle) -> None:
    networks = dict(shapes.manifest.networks)
    halves = tuple(one.model_copy(update={"dtype": "float16"}) for one in networks["denoiser"].inputs)
    networks["denoiser"] = networks["denoiser"].model_copy(update={"inputs": halves})
    half = dataclasses.replace(shapes, manifest=shapes.manifest.model_copy(update={"networks": networks}))
    with pytest.raises(BundleError, match="programs are played in float32"):
        program(half)


def test_pipeline_and_command_write_the_same(
    shapes: Bundle,
    pipeline: Pipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["runtime", "program", str(shapes.folder), "--devices", "cpu*2", *words])
        return runtime_command.main()

    options = ("--mode", "conservative", "--k", "3", "--steps", "9", "--guidance", "3", "--size", "48x64")
    assert run(*options, "--out", str(tmp_path / "command")) == 0
    assert "9 steps in 5 rounds" in capsys.readouterr().out
    pipeline.program(
        tmp_path / "python", mode="conservative", k=3, num_inference_steps=9, guidance_scale=3, width=48, height=64
    )
    assert (tmp_path / "command").read_bytes() == (tmp_path / "python").read_bytes()
    for words, said in {
        ("--mode", "sequential", "--size", "64"): "WIDTHxHEIGHT",
        ("--mode", "sequential", "--size", "63x64"): "width=63",
        ("--mode", "adaptive"): "measures",
        ("--mode", "sequential", "--steps", "0"): "num_inference_steps",
    }.items():
        assert run(*words, "--out", str(tmp_path / "none")) == 1
        assert said in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "devices"),
    [
        ({}, "cpu*2"),
        ({"mode": "srds", "num_inference_steps": 9}, "cpu@1"),
        ({"scheduler": "ddpm", "drafts": "fresh"}, "cpu"),
    ],
)
def test_both_readers_take_what_is_whole(shapes: Bundle, options: dict[str, Any], devices: str) -> None:
    content = program(shapes, devices, **options).pack()
    assert verdict(content) == "OK"
    assert verdicts([content]) == ["OK"]


def test_every_cut_and_every_flipped_byte_is_rejected(shapes: Bundle) -> None:
    content = program(shapes, num_inference_steps=2).pack()
    damaged = [content[:size] for size in range(0, len(content), 7)] + [content + b"\0"]
    for at in range(0, len(content), 3):
        damaged.append(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
    assert "OK" not in verdicts(damaged)
    assert not any(verdict(one) == "OK" for one in damaged)
    later = sealed(2, content[HEADER.size :])
    assert verdict(later) == "VERSION" and verdicts([later]) == ["VERSION"]


def test_a_text_is_named_by_its_first_byte(shapes: Bundle) -> None:
    """An offset within a text may be within a character, and a path of 1,024 bytes has fewer characters."""
    whole = program(shapes, num_inference_steps=2)
    start = whole.slots[1].name
    text = whole.text[:start] + "é".encode() + whole.text[start + 2 :]
    for name, code in [(start, "OK"), (start + 1, "PROGRAM"), (start + 2, "PROGRAM")]:
        slots = [whole.slots[0], whole.slots[1]._replace(name=name), *whole.slots[2:]]
        content = dataclasses.replace(whole, text=text, slots=slots).pack()
        assert (verdict(content), verdicts([content])) == (code, [code])
    for count, code in [(512, "OK"), (513, "PROGRAM")]:
        named = dataclasses.replace(whole, text=whole.text + "é".encode() * count + b"\0")
        content = dataclasses.replace(
            named, files=[whole.files[0]._replace(name=len(whole.text)), *whole.files[1:]]
        ).pack()
        assert (verdict(content), verdicts([content])) == (code, [code])


def compare(shapes: Bundle, rng: np.random.Generator, count: int, variant: str) -> None:
    content = program(shapes, num_inference_steps=3, scheduler="euler_a").pack()
    damaged = list(mutations(content, rng, count))
    own = list(map(verdict, damaged))
    found = verdicts(damaged, variant)
    different = [n for n in range(count) if own[n] != found[n]]
    assert not different, f"Python says {own[different[0]]}, C++ {found[different[0]]}"
    assert own.count("PROGRAM") > count / 2  # damage is found behind a checksum that fits, too
    assert own.count("OK") > 0  # and what still makes sense is not: another coefficient, another seed of noise


def test_the_readers_agree_on_damaged_files(shapes: Bundle, rng: np.random.Generator) -> None:
    compare(shapes, rng, 5000, "plain")


@pytest.mark.parametrize(
    "count", [pytest.param(6000, marks=pytest.mark.slow), pytest.param(300_000, marks=pytest.mark.soak)]
)
def test_the_reader_is_clean_on_damaged_files(shapes: Bundle, rng: np.random.Generator, count: int) -> None:
    """With AddressSanitizer and UndefinedBehaviorSanitizer, which end the process at the first fault."""
    compare(shapes, rng, count, "address")


def test_a_damaged_program_is_not_written(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer reads what it made: a fault of its own does not reach a player."""
    monkeypatch.setattr(layout, "MOST_BYTES", 100)
    with pytest.raises(ProgramError, match="damaged"):
        write("none.program")
    assert not (tmp_path / "none.program").exists()


def changed(program: ProgramFile, section: str, at: int, **fields: Any) -> ProgramFile:
    """The program with another record."""
    rows = list(getattr(program, section))
    rows[at] = rows[at]._replace(**fields)
    replaced: dict[str, Any] = {section: rows}
    return dataclasses.replace(program, **replaced)


def rewired(program: ProgramFile, at: int, slot: int) -> ProgramFile:
    """The program with another slot in a combination."""
    references = list(program.references)
    references[at] = slot
    return dataclasses.replace(program, references=references)


def one_rule_broken(program: ProgramFile) -> dict[str, ProgramFile]:
    """Programs that break one rule of the format each, by the rule."""
    slots = [slot.kind for slot in program.slots]
    noise, output = slots.index(layout.NOISE_SLOT), slots.index(layout.OUTPUT_SLOT)
    rounds = [n for n, one in enumerate(program.operations) if one.kind == layout.PREDICT]
    wide = [program.operations[n] for n in rounds if program.operations[n].size > 1][-1]  # its slots are written before
    combine = next(n for n, one in enumerate(program.operations) if one.kind == layout.COMBINE)
    made = program.operations[combine]
    tensor = {one.source: n for n, one in enumerate(program.tensors)}
    name = program.text.index(b"denoiser.onnx")
    twice = program.evaluations[wide.first].output
    last = len(slots) - 1
    return {
        "two evaluations write one slot": changed(program, "evaluations", wide.first + 1, output=twice),
        "an evaluation reads an output": changed(program, "evaluations", 0, latent=output),
        "an evaluation writes a latent": changed(program, "evaluations", 0, output=0),
        "a step that is not there": changed(program, "evaluations", 0, step=program.model.steps),
        "a slot that is not there": changed(program, "evaluations", 0, latent=last + 1),
        "a source before it is written": rewired(program, made.first, last),
        "a source twice": rewired(program, made.first + 1, program.references[made.first]),
        "noise as a target": rewired(program, made.targets_first, noise),
        "an output as a target": rewired(program, made.targets_first, output),
        "more steps than there are": changed(program, "operations", combine, finished=program.model.steps + 1),
        "the end without its last step": changed(program, "operations", -1, finished=0),
        "a round with a target": changed(program, "operations", rounds[0], targets_size=1),
        "an unknown operation": changed(program, "operations", combine, kind=3),
        "a coefficient that is not finite": dataclasses.replace(
            program, coefficients=[float("nan"), *program.coefficients[1:]]
        ),
        "coefficients left over": dataclasses.replace(program, coefficients=[*program.coefficients, 1.0]),
        "two states": changed(program, "slots", noise, kind=layout.STATE_SLOT, number=0),
        "noise without a number": changed(program, "slots", noise, number=0),
        "networks in another order": changed(program, "networks", 0, role=layout.DENOISER),
        "a file outside the bundle": dataclasses.replace(
            program, text=program.text[:name] + b"../oiser.onnx" + program.text[name + 13 :]
        ),
        "a path from the root": dataclasses.replace(
            program, text=program.text[:name] + b"/enoiser.onnx" + program.text[name + 13 :]
        ),
        "text that is not UTF-8": dataclasses.replace(
            program, text=program.text[:name] + b"\xffenoiser.onnx" + program.text[name + 13 :]
        ),
        "an input of another shape": changed(
            program, "tensors", tensor[layout.SAMPLE], dims=(-1, 4, 16, 17, 0, 0)
        ),
        "an input of another type": changed(program, "tensors", tensor[layout.TIMESTEP], dtype=layout.INT64),
        "an input that is missing": changed(program, "tensors", tensor[layout.TIMESTEP], source=layout.GUIDANCE),
        "an output of the encoder that is not there": changed(program, "tensors", tensor[layout.ENCODED], number=1),
        "a tokenizer that is not there": changed(program, "tensors", tensor[layout.TOKENS], number=1),
        "costs that do not rise": dataclasses.replace(program, costs=[layout.Cost(2, 0, 1.0), layout.Cost(2, 0, 1.0)]),
        "a cost of nothing": dataclasses.replace(program, costs=[layout.Cost(1, 0, 0.0)]),
        "no lanes": dataclasses.replace(program, model=program.model._replace(lanes=0)),
        "an unknown flag": dataclasses.replace(program, model=program.model._replace(flags=2)),
    }  # fmt: skip


def test_every_rule_of_the_format(shapes: Bundle) -> None:
    broken = one_rule_broken(program(shapes, scheduler="euler_a", k=3, num_inference_steps=12))
    found = dict(zip(broken, verdicts([one.pack() for one in broken.values()]), strict=True))
    assert found == dict.fromkeys(broken, "PROGRAM")
    assert {rule: verdict(one.pack()) for rule, one in broken.items()} == found
