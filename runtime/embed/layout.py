"""The layout of a program file, `PROGRAM.md` in code: records, packing, and the reader that checks everything.

`src/program.cc` is the same in C++; tests feed both the same damaged files and compare what they say.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from engines.errors import BundleError

MAGIC = b"DRIFPROG"
VERSION = 1
HEADER = struct.Struct("<8sIIQQ32s")  # magic, version, sections, bytes of the file, 0, sha256 of what follows
ENTRY = struct.Struct("<IIQQ")  # id, bytes of a record, offset, records
MOST_BYTES = 1 << 28
PREDICT, COMBINE = 1, 2
STATE_SLOT, LATENT_SLOT, OUTPUT_SLOT, NOISE_SLOT = 0, 1, 2, 3
TEXT_ENCODER, DENOISER, VAE_DECODER = 1, 2, 3
ONNX, WEIGHTS, COMPILED, COMPILED_WEIGHTS, TOKENIZER = 1, 2, 3, 4, 5
MADE, SAMPLE, TIMESTEP, ENCODED, TIME_IDS, GUIDANCE, TOKENS, CLIP_SKIP = range(8)  # where an input comes from
NO_GUIDANCE, CLASSIFIER_FREE, EMBEDDED = 0, 1, 2
FLOAT32, INT64 = 1, 7  # as ONNX numbers them
ZERO_NEGATIVE = 1  # flag of a model
DIMS = 6


class ProgramError(BundleError):
    """A program file that cannot be read. `code` is the name of the status that the C library answers with."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Model(NamedTuple):
    """One record; names and texts are offsets into the section of texts."""

    model: int
    source: int
    scheduler: int
    mode: int
    drafts: int
    runtime: int
    steps: int
    k: int
    guidance_kind: int
    flags: int
    width: int
    height: int
    channels: int
    latent_height: int
    latent_width: int
    lanes: int
    threads: int
    clip_skip: int
    guidance: float
    start_scale: float
    start_alpha: float
    start_sigma: float
    pixel_scale: float
    pixel_shift: float


class Step(NamedTuple):
    """What the model is told at a step, and where the step begins."""

    timestep: float
    alpha: float
    sigma: float


class Slot(NamedTuple):
    """A latent. `number` is what the noise of a noise slot is drawn for."""

    name: int
    kind: int
    number: int
    reserved: int = 0


class Operation(NamedTuple):
    """PREDICT: evaluations [first, first + size). COMBINE: references to sources and targets, coefficients, steps."""

    kind: int
    first: int
    size: int
    targets_first: int
    targets_size: int
    finished: int
    coefficient: int


class Evaluation(NamedTuple):
    """One ε."""

    latent: int
    step: int
    output: int


class Network(NamedTuple):
    """One network; its inputs, then its outputs, are neighbours among the tensors."""

    role: int
    name: int
    first_tensor: int
    inputs: int
    outputs: int
    first_file: int
    files: int
    reserved: int = 0


class Tensor(NamedTuple):
    """An input or output. Dimension −1 is the batch. `number` says which output of the encoder, or which tokenizer."""

    name: int
    dtype: int
    source: int
    number: int
    rank: int
    reserved: int
    dims: tuple[int, ...]


class File(NamedTuple):
    """A file of the bundle. A compiled one is for one machine and one version of ONNX Runtime."""

    name: int
    kind: int
    machine: int
    runtime: int
    size: int
    sha256: bytes


class TokenizerSpec(NamedTuple):
    """How a prompt becomes ids of fixed number."""

    file: int
    max_length: int
    pad_id: int
    end_id: int


class Cost(NamedTuple):
    """The measured seconds of a call of so many branches; see `lane_policy`."""

    branches: int
    reserved: int
    seconds: float


RECORDS: dict[str, struct.Struct] = {
    "text": struct.Struct("<s"),
    "model": struct.Struct("<18I6d"),
    "steps": struct.Struct("<3d"),
    "slots": struct.Struct("<4I"),
    "operations": struct.Struct("<6IQ"),
    "evaluations": struct.Struct("<3I"),
    "references": struct.Struct("<I"),
    "coefficients": struct.Struct("<d"),
    "networks": struct.Struct("<8I"),
    "tensors": struct.Struct("<6I6q"),
    "files": struct.Struct("<4IQ32s"),
    "tokenizers": struct.Struct("<2I2q"),
    "costs": struct.Struct("<2Id"),
}
SECTIONS = tuple(RECORDS)  # a section's id is its place here, from 1


@dataclass(frozen=True)
class ProgramFile:
    """The content of a program file."""

    text: bytes
    model: Model
    steps: Sequence[Step]
    slots: Sequence[Slot]
    operations: Sequence[Operation]
    evaluations: Sequence[Evaluation]
    references: Sequence[int]
    coefficients: Sequence[float]
    networks: Sequence[Network]
    tensors: Sequence[Tensor]
    files: Sequence[File]
    tokenizers: Sequence[TokenizerSpec]
    costs: Sequence[Cost]

    def string(self, offset: int) -> str:
        """The text at an offset."""
        return self.text[offset : self.text.index(0, offset)].decode()

    def has_text(self, *offsets: int) -> bool:
        """Whether a text begins at each offset: one within a text may be within a character."""
        return all(offset < len(self.text) and not any(self.text[:offset][-1:]) for offset in offsets)

    def pack(self) -> bytes:
        """The file."""
        flat = [(*tensor[:6], *tensor.dims) for tensor in self.tensors]
        rows: dict[str, Sequence[Sequence[object]]] = {
            "text": [(bytes([byte]),) for byte in self.text],
            "model": [self.model],
            "references": [(one,) for one in self.references],
            "coefficients": [(one,) for one in self.coefficients],
            "tensors": flat,
        }
        table, body = b"", b""
        start = HEADER.size + ENTRY.size * len(SECTIONS)
        for number, name in enumerate(SECTIONS, 1):
            record, records = RECORDS[name], rows.get(name) or getattr(self, name)
            body += bytes(-len(body) % 8)
            table += ENTRY.pack(number, record.size, start + len(body), len(records))
            body += b"".join(record.pack(*one) for one in records)
        return sealed(VERSION, table + body)


def sealed(version: int, content: bytes) -> bytes:
    """A header in front of the sections."""
    size, digest = HEADER.size + len(content), hashlib.sha256(content).digest()
    return HEADER.pack(MAGIC, version, len(SECTIONS), size, 0, digest) + content


def unpack(content: bytes) -> ProgramFile:
    """The checked content of a file; ProgramError for anything that no writer of this version makes."""
    if len(content) < HEADER.size or content[:8] != MAGIC:
        raise ProgramError("PROGRAM", "this is no program file")
    _, version, sections, size, reserved, digest = HEADER.unpack_from(content)
    if version != VERSION:
        raise ProgramError("VERSION", f"the program has version {version}, this reader knows {VERSION}: write it again")
    _expect(size == len(content) <= MOST_BYTES, f"the file has {len(content)} bytes and says {size}")
    _expect(hashlib.sha256(content[HEADER.size :]).digest() == digest, "the checksum differs: it was altered")
    _expect(sections == len(SECTIONS) and not reserved, "the header is not that of this version")
    raw, end = {}, HEADER.size + ENTRY.size * sections
    _expect(end <= size, "the table of sections is cut")
    for number, name in enumerate(SECTIONS, 1):
        found, record, offset, count = ENTRY.unpack_from(content, HEADER.size + ENTRY.size * (number - 1))
        padded = end + -end % 8
        _expect(
            (found, record, offset) == (number, RECORDS[name].size, padded), f"section {name} is not where it should be"
        )
        _expect(
            not any(content[end:padded]) and count <= (size - min(offset, size)) // record, f"section {name} is cut"
        )
        end = offset + count * record
        raw[name] = content[offset:end]
    _expect(end == size, "there is something after the last section")
    program = _parsed(raw)
    _check_model(program)
    _check_networks(program)
    _check_operations(program)
    return program


def _expect(true: bool, message: str) -> None:
    if not true:
        raise ProgramError("PROGRAM", f"the program file is damaged: {message}")


def _parsed(raw: dict[str, bytes]) -> ProgramFile:
    rows = {name: list(RECORDS[name].iter_unpack(raw[name])) for name in SECTIONS if name != "text"}
    text = raw["text"]
    _expect(text[:1] == b"\0" == text[-1:], "the texts have no end")
    try:
        text.decode()
    except UnicodeDecodeError:
        _expect(False, "the texts are not UTF-8")
    _expect(len(rows["model"]) == 1, "there must be one model")
    return ProgramFile(
        text=text, model=Model(*rows["model"][0]),
        steps=[Step(*row) for row in rows["steps"]], slots=[Slot(*row) for row in rows["slots"]],
        operations=[Operation(*row) for row in rows["operations"]],
        evaluations=[Evaluation(*row) for row in rows["evaluations"]],
        references=[row[0] for row in rows["references"]], coefficients=[row[0] for row in rows["coefficients"]],
        networks=[Network(*row) for row in rows["networks"]],
        tensors=[Tensor._make((*row[:6], row[6:])) for row in rows["tensors"]],
        files=[File(*row) for row in rows["files"]],
        tokenizers=[TokenizerSpec(*row) for row in rows["tokenizers"]], costs=[Cost(*row) for row in rows["costs"]],
    )  # fmt: skip


def _check_model(program: ProgramFile) -> None:
    model = program.model
    _expect(program.has_text(*model[:6]), "a text of the model is outside")
    _expect(1 <= model.steps == len(program.steps) <= 100_000, "the number of steps differs")
    _expect(
        1 <= model.k <= 1000 and model.guidance_kind <= EMBEDDED and model.flags <= ZERO_NEGATIVE,
        "k, guidance or flags",
    )
    _expect(all(1 <= side <= 1 << 16 for side in model[10:15]), "a size is out of range")
    _expect(1 <= model.lanes <= 64 and model.threads <= 1024 and model.clip_skip <= 64, "lanes, threads or clip_skip")
    numbers = [*model[18:], *(value for step in program.steps for value in step), *program.coefficients]
    _expect(all(map(math.isfinite, numbers)), "a number is not finite")
    branches = [cost.branches for cost in program.costs]
    _expect(
        branches == sorted(set(branches)) and all(branches) and branches[-1:] <= [1 << 16], "the costs are not in order"
    )
    _expect(all(not c.reserved and 0 < c.seconds < math.inf for c in program.costs), "a cost is not a positive number")


def _check_networks(program: ProgramFile) -> None:
    tensors, files = program.tensors, program.files
    networks = program.networks
    _expect(
        [n.role for n in networks] == [TEXT_ENCODER, DENOISER, VAE_DECODER],
        "text encoder, denoiser, VAE decoder are needed",
    )
    tensor, file = 0, 0
    for network in networks:
        _expect((network.first_tensor, network.first_file, network.reserved) == (tensor, file, 0), "networks overlap")
        _expect(
            1 <= network.inputs <= 64 and 1 <= network.outputs <= 64 and 1 <= network.files <= 64,
            "a network without tensors or files",
        )
        _expect(program.has_text(network.name), "the name of a network is outside")
        tensor, file = tensor + network.inputs + network.outputs, file + network.files
        _expect(tensor <= len(tensors) and file <= len(files), "tensors or files are missing")
        kinds = [one.kind for one in files[network.first_file : file]]
        _expect(
            kinds.count(ONNX) == 1 and set(kinds) <= {ONNX, WEIGHTS, COMPILED, COMPILED_WEIGHTS}, "files of a network"
        )
        _expect(all(kinds.count(kind) <= 1 for kind in kinds), "two files of one kind")
        _expect(COMPILED in kinds or COMPILED_WEIGHTS not in kinds, "compiled weights without a compiled network")
    _expect(tensor == len(tensors) and file + len(program.tokenizers) == len(files), "tensors or files are left over")
    for number, one in enumerate(files):
        _expect(program.has_text(one.name, one.machine, one.runtime), "the text of a file is outside")
        name = program.string(one.name)
        parts = name.split("/")
        _expect(
            0 < len(name.encode()) <= 1024 and not {"", ".", ".."} & set(parts) and "\\" not in name,
            "the name of a file",
        )
        _expect(1 <= one.kind <= TOKENIZER and (one.kind == TOKENIZER) == (number >= file), "the kind of a file")
        _expect(one.size < 1 << 48, "the size of a file")
    for number, spec in enumerate(program.tokenizers):
        _expect(spec.file == file + number and 2 <= spec.max_length <= 1 << 16, "a tokenizer")
        _expect(min(spec.pad_id, spec.end_id) >= 0 and max(spec.pad_id, spec.end_id) < 1 << 31, "an id of a tokenizer")
    for network in networks:
        _check_tensors(program, network)


def _check_tensors(program: ProgramFile, network: Network) -> None:
    model, encoder = program.model, program.networks[0]
    inputs = program.tensors[network.first_tensor :][: network.inputs]
    outputs = program.tensors[network.first_tensor + network.inputs :][: network.outputs]
    made = program.tensors[encoder.first_tensor + encoder.inputs :][: encoder.outputs]
    allowed = {
        TEXT_ENCODER: {TOKENS, CLIP_SKIP},
        DENOISER: {SAMPLE, TIMESTEP, ENCODED, TIME_IDS, GUIDANCE},
        VAE_DECODER: {SAMPLE},
    }
    latent = (-1, model.channels, model.latent_height, model.latent_width)
    for tensor in (*inputs, *outputs):
        _expect(tensor.name > 0 and program.has_text(tensor.name) and not tensor.reserved, "the name of a tensor")
        _expect(1 <= tensor.rank <= DIMS and tensor.dims[0] == -1, "a tensor without a batch")
        _expect(all(1 <= size <= 1 << 24 for size in tensor.dims[1 : tensor.rank]), "a dimension is out of range")
        _expect(
            not any(tensor.dims[tensor.rank :]) and math.prod(tensor.dims[1 : tensor.rank]) <= 1 << 28,
            "a tensor is too large",
        )
    for tensor in inputs:
        source, shape = tensor.source, tensor.dims[: tensor.rank]
        _expect(source in allowed[network.role], "an input of the wrong kind")
        _expect(tensor.dtype == (INT64 if source in (TOKENS, CLIP_SKIP) else FLOAT32), "the type of an input")
        if source == TOKENS:
            _expect(tensor.number < len(program.tokenizers), "an input for a tokenizer that is not there")
            wanted: tuple[int, ...] = (-1, program.tokenizers[tensor.number].max_length)
        elif source == ENCODED:
            _expect(tensor.number < len(made), "an input for an output that is not there")
            wanted = made[tensor.number].dims[: made[tensor.number].rank]
        else:
            wanted = {SAMPLE: latent, TIME_IDS: (-1, 6)}.get(source, (-1,))
        _expect(shape == wanted and (source in (TOKENS, ENCODED) or not tensor.number), "the shape of an input")
    sources = [(tensor.source, tensor.number) for tensor in inputs]
    _expect(len(set(sources)) == len(sources), "an input is there twice")
    needed = {DENOISER: {SAMPLE, TIMESTEP}, VAE_DECODER: {SAMPLE}, TEXT_ENCODER: set()}[network.role]
    _expect(needed <= {source for source, _ in sources}, "an input is missing")
    _expect(all((t.source, t.number, t.dtype) == (MADE, 0, FLOAT32) for t in outputs), "the type of an output")
    images = {DENOISER: latent, VAE_DECODER: (-1, 3, model.height, model.width)}.get(network.role)
    _expect(images is None or outputs[0].dims[: outputs[0].rank] == images, "the shape of an output")
    _expect(images is None or len(outputs) == 1, "one output is needed")


def _check_operations(program: ProgramFile) -> None:
    slots, model, references = program.slots, program.model, program.references
    _expect(
        len(slots) <= 1 << 16 and [s.kind for s in slots].count(STATE_SLOT) == 1 and slots[0].kind == STATE_SLOT,
        "slots",
    )
    for slot in slots:
        _expect(program.has_text(slot.name) and slot.kind <= NOISE_SLOT and not slot.reserved, "a slot")
        _expect((slot.number > 0) == (slot.kind == NOISE_SLOT), "the number of a slot")
    written = {number for number, slot in enumerate(slots) if slot.kind in (STATE_SLOT, NOISE_SLOT)}
    evaluation = reference = coefficient = finished = 0
    for one in program.operations:
        if one.kind == PREDICT:
            _expect(one.first == evaluation and 1 <= one.size <= 4096, "evaluations overlap")
            _expect(not any(one[3:]), "a round has no targets")
            evaluation += one.size
            _expect(evaluation <= len(program.evaluations), "evaluations are missing")
            made = program.evaluations[one.first : evaluation]
            for latent, step, output in made:
                _expect(
                    latent in written and slots[latent].kind != OUTPUT_SLOT,
                    "an evaluation reads a slot before it is written",
                )
                _expect(
                    step < model.steps and output < len(slots) and slots[output].kind == OUTPUT_SLOT, "an evaluation"
                )
            _expect(len({e.output for e in made}) == len(made), "two evaluations write one slot")
            written.update(e.output for e in made)
            continue
        _expect(one.kind == COMBINE, "an operation of an unknown kind")
        _expect((one.first, one.targets_first) == (reference, reference + one.size), "references overlap")
        _expect(1 <= one.size <= 4096 and 1 <= one.targets_size <= 4096, "a combination without slots")
        reference = one.targets_first + one.targets_size
        _expect(reference <= len(references) and one.coefficient == coefficient, "references are missing")
        coefficient += one.size * one.targets_size
        _expect(coefficient <= len(program.coefficients), "coefficients are missing")
        sources, targets = references[one.first : one.targets_first], references[one.targets_first : reference]
        _expect(all(slot in written for slot in sources), "a combination reads a slot before it is written")
        _expect(len(set(sources)) == len(sources) and len(set(targets)) == len(targets), "a slot is there twice")
        _expect(
            all(slot < len(slots) and slots[slot].kind in (STATE_SLOT, LATENT_SLOT) for slot in targets), "a target"
        )
        _expect(one.finished <= model.steps, "more steps are finished than there are")
        finished = one.finished
        written.update(targets)
    _expect(finished == model.steps and program.operations[-1].kind == COMBINE, "the program ends before its last step")
    _expect(
        (evaluation, reference, coefficient) == (len(program.evaluations), len(references), len(program.coefficients)),
        "something is left over",
    )
