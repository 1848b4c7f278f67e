"""From a sampler and an exported model to a program file: what `libdriffusion` plays without Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engines.devices import LaneSpec
from engines.errors import BundleError, ParameterError
from engines.files import written_whole
from engines.manifest import DENOISER, Manifest, TensorSpec
from engines.store import Bundle, plan_key
from runtime.auto import Calibration
from runtime.call import OPTIONS, Call
from runtime.embed import layout
from runtime.initial_state import InitialState
from runtime.sampling.drafts import resolve
from runtime.sampling.noise import noise_slots
from runtime.sampling.operations import STATE, Combine, Options, Predict
from runtime.sampling.samplers import SAMPLERS, check, measures
from runtime.sampling.schedule import Schedule
from runtime.sampling.schedulers import make_schedule

ROLES = {"text_encoder": layout.TEXT_ENCODER, DENOISER: layout.DENOISER, "vae_decoder": layout.VAE_DECODER}
GUIDANCE = {"none": layout.NO_GUIDANCE, "classifier_free": layout.CLASSIFIER_FREE, "embedded": layout.EMBEDDED}
# arguments of `Pipeline.generate` that driffusion_call has, and those that neither it nor a program has
PARAMETERS = ("prompt", "negative_prompt", "seed", "num_images_per_prompt", "latents")
UNPLAYED = (
    "image", "strength", "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds", "lanes", "priority", "timeline", "cache_interval",
)  # fmt: skip
DTYPES = {"float32": layout.FLOAT32, "int64": layout.INT64}


@dataclass(frozen=True)
class Recipe:
    """What is fixed in a program. Prompt, seed, guidance scale and the number of images are parameters of a call."""

    mode: str
    options: Options
    schedule: Schedule
    size: tuple[int, int]
    guidance_scale: float
    clip_skip: int = 0


@dataclass
class _Texts:
    content: bytearray = field(default_factory=lambda: bytearray(1))
    offsets: dict[str, int] = field(default_factory=lambda: {"": 0})

    def __call__(self, text: str) -> int:
        if text not in self.offsets:
            self.offsets[text] = len(self.content)
            self.content += text.encode() + b"\0"
        return self.offsets[text]


class _Operations:
    """The sampler's operations as records, with slots numbered in the order in which they are first written."""

    def __init__(self, recipe: Recipe, texts: _Texts) -> None:
        self._texts = texts
        self.slots: list[layout.Slot] = []
        self._index: dict[str, int] = {}
        self.operations: list[layout.Operation] = []
        self.evaluations: list[layout.Evaluation] = []
        self.references: list[int] = []
        self.coefficients: list[float] = []
        schedule = recipe.schedule
        self._slot(STATE, layout.STATE_SLOT)
        for step in schedule.stochastic_steps:
            for slot, number in noise_slots(step, schedule.steps, recipe.options):
                self._slot(slot, layout.NOISE_SLOT, number)
        for operation in SAMPLERS[recipe.mode](schedule, recipe.options):
            if isinstance(operation, Predict):
                self._predict(operation)
            else:
                assert isinstance(operation, Combine), "a sampler that measures is refused before"
                self._combine(operation)

    def _slot(self, name: str, kind: int, number: int = 0) -> int:
        if name not in self._index:
            self._index[name] = len(self.slots)
            self.slots.append(layout.Slot(self._texts(name), kind, number))
        return self._index[name]

    def _predict(self, operation: Predict) -> None:
        first = len(self.evaluations)
        self.evaluations += [
            layout.Evaluation(self._index[one.latent], one.step, self._slot(one.output, layout.OUTPUT_SLOT))
            for one in operation.evaluations
        ]
        self.operations.append(layout.Operation(layout.PREDICT, first, len(operation.evaluations), 0, 0, 0, 0))

    def _combine(self, operation: Combine) -> None:
        first = len(self.references)
        self.references += [self._index[slot] for slot in operation.sources]
        targets = len(self.references)
        self.references += [self._slot(slot, layout.LATENT_SLOT) for slot in operation.targets]
        record = layout.Operation(
            layout.COMBINE, first, len(operation.sources), targets, len(operation.targets), operation.finished,
            len(self.coefficients),
        )  # fmt: skip
        self.operations.append(record)
        self.coefficients += [float(value) for row in operation.rows for value in row]


class _Networks:
    """The networks of a bundle as records, with every file that they are made of and its hash."""

    def __init__(self, bundle: Bundle, size: tuple[int, int], texts: _Texts) -> None:
        self._bundle, self._texts, self._manifest = bundle, texts, bundle.manifest
        self._axes = {**self._manifest.latent_axes(*size, batch=1)}
        self.networks: list[layout.Network] = []
        self.tensors: list[layout.Tensor] = []
        self.files: list[layout.File] = []
        for name, role in ROLES.items():
            self._network(name, role)
        self.tokenizers: list[layout.TokenizerSpec] = []
        for spec in self._manifest.tokenizers:
            number = len(self.files)
            self._file(spec.file.name, layout.TOKENIZER, spec.file.bytes, spec.file.sha256)
            made = layout.TokenizerSpec(number, spec.max_length, spec.pad_token_id, spec.eos_token_id)
            self.tokenizers.append(made)

    def _network(self, name: str, role: int) -> None:
        network = self._manifest.networks[name]
        first_tensor, first_file = len(self.tensors), len(self.files)
        for tensor in network.inputs:
            self._tensor(tensor, *self._source(name, tensor))
        for tensor in network.outputs:
            self._tensor(tensor, layout.MADE, 0)
        self._file(network.file.name, layout.ONNX, network.file.bytes, network.file.sha256)
        if network.data is not None:
            self._file(network.data.name, layout.WEIGHTS, network.data.bytes, network.data.sha256)
        self._compiled(name)
        tensors, files = (len(network.inputs), len(network.outputs)), len(self.files) - first_file
        self.networks.append(layout.Network(role, self._texts(name), first_tensor, *tensors, first_file, files))

    def _source(self, network: str, tensor: TensorSpec) -> tuple[int, int]:
        """Where the player takes an input from."""
        manifest = self._manifest
        names = [spec.input for spec in manifest.tokenizers]
        fixed = {
            "sample": layout.SAMPLE, "latent_sample": layout.SAMPLE, "timestep": layout.TIMESTEP,
            "time_ids": layout.TIME_IDS, "guidance": layout.GUIDANCE, "clip_skip": layout.CLIP_SKIP,
        }  # fmt: skip
        if network == "text_encoder" and tensor.name in names:
            return layout.TOKENS, names.index(tensor.name)
        if network == DENOISER and tensor.name in manifest.conditioning:
            return layout.ENCODED, manifest.conditioning.index(tensor.name)
        if tensor.name not in fixed:
            raise BundleError(f"a program cannot name what the input {tensor.name} of {network} is")
        return fixed[tensor.name], 0

    def _tensor(self, tensor: TensorSpec, source: int, index: int) -> None:
        if tensor.dtype not in DTYPES:
            raise BundleError(
                f"{self._manifest.model} is exported in {self._manifest.precision}, and programs are played in "
                "float32, on GPUs, too: export it with DEVICES=cpu"
            )
        dims = [
            -1 if axis == "batch" else size for axis, size in zip(tensor.shape, tensor.resolve(self._axes), strict=True)
        ]
        padded = (*dims, *[0] * (layout.DIMS - len(dims)))
        self.tensors.append(
            layout.Tensor(self._texts(tensor.name), DTYPES[tensor.dtype], source, index, len(dims), 0, padded)
        )

    def _file(self, name: str, kind: int, size: int, sha256: str, fields: Mapping[str, str] | None = None) -> None:
        machine, runtime = (self._texts(fields[key]) if fields else 0 for key in ("machine", "runtime"))
        self.files.append(layout.File(self._texts(name), kind, machine, runtime, size, bytes.fromhex(sha256)))

    def _compiled(self, name: str) -> None:
        """The plan of this machine, if there is one: opened in place of the ONNX file where machine and version fit."""
        from engines import ort

        fields = ort.plan_fields(self._bundle, name)
        plan = self._bundle.plans().get(plan_key(fields))
        if plan is None:
            return
        folder = f"plans/{plan.key}"
        self._file(f"{folder}/{plan.file.name}", layout.COMPILED, plan.file.bytes, plan.file.sha256, fields)
        if plan.data is not None:
            data = plan.data
            self._file(f"{folder}/{data.name}", layout.COMPILED_WEIGHTS, data.bytes, data.sha256, fields)


def refuse_measuring(call: Call) -> None:
    """ParameterError for a sampler that decides by what it measures, and for mode auto."""
    if call.mode == "auto":
        raise ParameterError("mode", f"a program holds one sampler: name the mode, {', '.join(SAMPLERS)}")
    if measures(call.mode, Options(tolerance=call.tolerance or 0.0)):
        raise ParameterError(
            "mode",
            f"{call.mode} decides by what it measures: its coefficients depend on which drafts were accepted, so that "
            "a program would need one branch for every outcome; use conservative or aggressive, or srds with "
            "tolerance 0",
        )


def make_program(bundle: Bundle, recipe: Recipe, lanes: Sequence[LaneSpec]) -> layout.ProgramFile:
    """The program of a recipe for a model, with the placement that it will be opened with unless told otherwise."""
    manifest, schedule, texts = bundle.manifest, recipe.schedule, _Texts()
    _check_played(manifest)
    operations = _Operations(recipe, texts)
    networks = _Networks(bundle, recipe.size, texts)
    model = _model(manifest, recipe, lanes, texts)
    return layout.ProgramFile(
        text=bytes(texts.content), model=model,
        steps=[layout.Step(float(row.timestep), row.alpha, row.sigma) for row in schedule.rows],
        slots=operations.slots, operations=operations.operations, evaluations=operations.evaluations,
        references=operations.references, coefficients=operations.coefficients, networks=networks.networks,
        tensors=networks.tensors, files=networks.files, tokenizers=networks.tokenizers,
        costs=_costs(bundle, lanes),
    )  # fmt: skip


def _check_played(manifest: Manifest) -> None:
    """ParameterError for what the player cannot do to texts and scales."""
    for what, there in (
        ("its prompts go into a chat template", any(one.template or one.pad_left for one in manifest.tokenizers)),
        ("its guidance is calculated in the denoiser's graph", manifest.guidance == "in_graph"),
        ("its guidance scale counts from 0", bool(manifest.guidance_offset)),
    ):
        if there:
            raise ParameterError("model", f"{manifest.model} cannot be played without Python: {what}")


def _model(manifest: Manifest, recipe: Recipe, lanes: Sequence[LaneSpec], texts: _Texts) -> layout.Model:
    schedule, options = recipe.schedule, recipe.options
    width, height = recipe.size
    axes = manifest.latent_axes(width, height, 1)
    return layout.Model(
        model=texts(manifest.model), source=texts(manifest.source), scheduler=texts(schedule.name),
        mode=texts(recipe.mode), drafts=texts(options.drafts),
        runtime=texts(_placement(lanes) or f"onnxruntime {manifest.versions.get('onnxruntime', '')}".strip()),
        steps=schedule.steps, k=options.k, guidance_kind=GUIDANCE[manifest.guidance],
        flags=layout.ZERO_NEGATIVE * manifest.zero_negative, width=width, height=height,
        channels=manifest.latent_channels, latent_height=axes["height"], latent_width=axes["width"],
        lanes=len(lanes), threads=max(lanes[0].threads, 1), clip_skip=recipe.clip_skip, guidance=recipe.guidance_scale,
        start_scale=schedule.init_noise_sigma, start_alpha=schedule.rows[0].alpha,
        start_sigma=schedule.rows[0].sigma, pixel_scale=0.5, pixel_shift=0.5,
    )  # fmt: skip


def _placement(lanes: Sequence[LaneSpec]) -> str:
    """GPUs as `driffusion_open` takes them; nothing for lanes on processor cores."""
    return ",".join(f"cuda:{lane.gpu}" for lane in lanes if lane.gpu is not None)


def _costs(bundle: Bundle, lanes: Sequence[LaneSpec]) -> list[layout.Cost]:
    """What calls took here, where it was measured: by it the lanes are shared among several images."""
    from engines import ort

    if _placement(lanes):
        return []  # calls on GPUs count alike

    folder = bundle.plan_folder(plan_key(ort.plan_fields(bundle, DENOISER)))
    measured = Calibration.read(folder / "calibration.json").calls.get(
        ",".join(f"{one}@{one.threads}" for one in lanes)
    )
    return [layout.Cost(branches, 0, seconds) for branches, seconds in sorted((measured or {}).items())]


def program_of(bundle: Bundle, lanes: Sequence[LaneSpec], call: Call) -> layout.ProgramFile:
    """The program that plays what `Pipeline.run` would play of a call; ParameterError for what cannot be made."""
    for name in (*PARAMETERS, *UNPLAYED):
        default = "" if name == "prompt" else OPTIONS[name].default
        value = getattr(call, name)
        if value is not default and (value is None or default is None or value != default):
            why = "a parameter of every call" if name in PARAMETERS else "nothing that the player can do"
            raise ParameterError(name, f"{name} is {why}, so that no program holds it: leave it out")
    manifest = bundle.manifest
    refuse_measuring(call)
    checked = call.checked(manifest, len(lanes), len(lanes))
    size = InitialState.of(manifest, None, None).size(manifest, checked.width, checked.height)
    schedule = make_schedule(manifest, checked.scheduler, checked.num_inference_steps, size, eta=checked.eta)
    options = Options(
        checked.k, resolve(checked.drafts), checked.tolerance or 0.0, checked.blocks, checked.pipelined,
        checked.iterations, tuple(checked.first_blocks),
    )  # fmt: skip
    check(checked.mode, schedule, options)
    recipe = Recipe(checked.mode, options, schedule, size, checked.guidance_scale, checked.clip_skip or 0)
    return make_program(bundle, recipe, lanes)


def write_program(program: layout.ProgramFile, path: Path) -> int:
    """Writes the file, whole or not at all; its size in bytes."""
    content = program.pack()
    layout.unpack(content)
    with written_whole(path) as partial:
        partial.write_bytes(content)
    return len(content)
