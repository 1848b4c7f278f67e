"""Families whose texts are read by a language model: from a folder that diffusers saved to images on two lanes."""

# covers: export/families/flux2.py, export/families/qwen_image.py, export/families/z_image.py

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.errors import ExportError, ParameterError
from export.bundle import exporter
from runtime.pipeline import Pipeline
from tests.export.families import compared
from tests.export.families.compared import NEGATIVE, PROMPTS, STEPS, Case, Compared, equal

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),  # diffusers and transformers, about themselves
]
SHALLOW = (1, 2, 4)  # of a tiny language model, in place of FLUX.2's own layers; the slow test has those


def flux2(name: str, **more: Any) -> Case:
    return Case(
        name, compared.tokens, given={"text_encoder_out_layers": SHALLOW}, negative=None,
        encode={"text_encoder_out_layers": SHALLOW}, guided=lambda scale, negative: {"guidance_scale": scale}, **more,
    )  # fmt: skip


CASES = {
    case.name: case
    for case in (
        flux2("flux2-klein"),
        flux2("flux2-dev"),
        Case(
            "qwen-image", compared.squares, compared.pack_squares,
            guided=lambda scale, negative: {"true_cfg_scale": scale, "negative_prompt": negative},
        ),
        Case("z-image", unguided=0.0, encode={"do_classifier_free_guidance": False}),
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory, exported_once: None) -> Iterator[Callable[[str], Compared]]:
    """Families by name, each made once for all tests of it."""
    from export.families import flux2
    from tests.tiny import save

    folder, made = tmp_path_factory.mktemp("tiny"), dict[str, Compared]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flux2, "KLEIN_LAYERS", SHALLOW)
        patch.setattr(flux2, "DEV_LAYERS", SHALLOW)

        def get(name: str) -> Compared:
            if name not in made:
                theirs = save(name, folder)
                theirs.set_progress_bar_config(disable=True)
                bundle = compared.build(folder / name, folder / "build")
                made[name] = Compared(CASES[name], theirs, folder / name, Pipeline(bundle, "cpu*2"))
            return made[name]

        yield get
    for one in made.values():
        one.ours.close()


@pytest.fixture
def made(request: pytest.FixtureRequest, known: Callable[[str], Compared]) -> Compared:
    """A family."""
    return known(request.param)


def every(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("made", names or tuple(CASES), indirect=True)


@every()
def test_images_equal_the_diffusers_pipeline(made: Compared, rng: np.random.Generator) -> None:
    for (width, height), guided, images in (((64, 64), False, 1), ((96, 72), True, 2), ((72, 128), True, 1)):
        noise = made.noise(rng, images, width, height)
        scale = 4.0 if guided else made.case.unguided
        asked = made.case.guided(scale, NEGATIVE)
        wanted = made.expected(noise, width, height, num_images_per_prompt=images, **asked)
        own: dict[str, Any] = {"negative_prompt": made.case.negative}
        if made.ours.manifest.guidance == "none":
            own = {}
        options = {"guidance_scale": scale, "num_images_per_prompt": images, **own}
        equal(made.generate(latents=noise, width=width, height=height, **options), wanted)


@every()
def test_every_mode_runs_on_two_lanes(made: Compared) -> None:
    options = {"seed": 1, "width": 64, "height": 64, "guidance_scale": 3.0}
    reference = made.generate(**options).latents
    assert np.array_equal(made.generate(mode="srds", **options).latents, reference)
    for mode in ("conservative", "aggressive"):
        result = made.generate(mode=mode, k=3, **options)
        assert result.report.rounds < STEPS and np.isfinite(result.latents).all()
        assert np.linalg.norm(result.latents - reference) > 0
    adaptive = made.generate(mode="adaptive", k=2, **options).latents
    assert np.linalg.norm(adaptive - reference) <= 1e-5 * np.linalg.norm(reference)


@every()
def test_prompts_become_the_ids_of_the_diffusers_pipeline(made: Compared) -> None:
    import torch

    given: list[Any] = []
    hook = made.theirs.text_encoder.register_forward_pre_hook(
        lambda module, args, options: given.append(options["input_ids"].numpy()), with_kwargs=True
    )
    with torch.no_grad():
        made.theirs.encode_prompt(prompt=list(PROMPTS), **made.case.encode)
    hook.remove()
    ((name, ours),), warnings = (lambda found: (found[0].items(), found[1]))(made.ours._tokenizer(PROMPTS))
    wide, pad = min(ours.shape[1], given[0].shape[1]), made.theirs.tokenizer.pad_token_id
    assert name == "input_ids" and np.array_equal(ours[:, :wide], given[0][:, :wide])
    assert (ours[:, wide:] == pad).all()
    assert len(warnings) == 1 and "was cut" in warnings[0]


@every()
def test_defaults_are_those_of_the_diffusers_pipeline(made: Compared) -> None:
    theirs = inspect.signature(type(made.theirs).__call__).parameters
    scale = theirs.get("true_cfg_scale", theirs["guidance_scale"])
    defaults = made.ours.manifest.defaults
    assert defaults.num_inference_steps == theirs["num_inference_steps"].default
    assert defaults.guidance_scale == scale.default


@every()
def test_embeddings_stand_in_for_prompts(made: Compared) -> None:
    states = made.ours.machine.runners["text_encoder"].run(**made.ours._tokenizer([compared.PROMPT])[0])
    options = {"seed": 4, "width": 64, "height": 64, "guidance_scale": made.case.unguided}
    given = made.generate(prompt=None, prompt_embeds=states["encoder_hidden_states"], **options)
    assert np.array_equal(given.latents, made.generate(**options).latents)


def refusal(folder: Path) -> str:
    """Why a folder cannot be exported, which is one line and said before any network is loaded."""
    from export.checks import check
    from export.families import Sides
    from export.loading import configs, open_source

    with pytest.raises(ExportError) as refused:
        source = open_source(folder)
        check(source, configs(source), Sides(64, 64, 128, 16))
    assert "\n" not in str(refused.value)
    return str(refused.value)


@every()
def test_wrong_folders_are_refused_in_one_line(made: Compared, tmp_path: Path) -> None:
    def changed(file: str, **values: Any) -> Path:
        folder = Path(shutil.copytree(made.folder, tmp_path / f"{len(list(tmp_path.iterdir()))}"))
        if values:
            edited = json.loads((folder / file).read_text()) | values
            (folder / file).write_text(json.dumps(edited))
        elif (folder / file).is_dir():
            shutil.rmtree(folder / file)
        else:
            (folder / file).unlink()
        return folder

    for part in ("text_encoder", "vae", "tokenizer", "transformer", "scheduler"):
        assert f"{part} missing; a {type(made.theirs).__name__} has it" in refusal(changed(part))
    assert "missing; a StableDiffusionXLPipeline has it" in refusal(
        changed("model_index.json", _class_name="StableDiffusionXLPipeline")
    )
    assert "takes 20 channels" in refusal(changed("transformer/config.json", in_channels=20))
    width = "cap_feat_dim" if made.case.name == "z-image" else "joint_attention_dim"
    assert "do not belong together" in refusal(changed("transformer/config.json", **{width: 40}))
    if (made.folder / "tokenizer" / "chat_template.jinja").is_file() and made.case.name != "qwen-image":
        assert "has no chat template" in refusal(changed("tokenizer/chat_template.jinja"))


@every()
def test_wrong_sizes_and_arguments_are_refused(made: Compared) -> None:
    for options, message in (
        (
            {"width": 68},
            "width=68 is not among the sizes of this engine: each side may be 64 to 128 pixels in steps of 8",
        ),
        ({"height": 256}, "height=256 is not among the sizes"),
        ({"pooled_prompt_embeds": np.zeros((1, 4))}, "takes no pooled_prompt_embeds"),
        ({"clip_skip": 1}, "clip_skip must be left out"),
    ):
        with pytest.raises(ParameterError, match=message):
            made.generate(**options)
    with pytest.raises(ParameterError, match="cannot be played without Python: its prompts go into a chat template"):
        made.ours.program(made.folder / "program", mode="sequential", width=64, height=64)


@pytest.mark.slow
@every()
def test_networks_for_gpus_stay_near_torch(made: Compared, tmp_path: Path) -> None:
    """The export itself refuses what is beyond its bound; here no network may come near it."""
    from export.families import Sides
    from export.loading import configs, open_source
    from export.to_onnx import export_network

    source = open_source(made.folder)
    factor = source.family.latents(configs(source)).factor
    for name, (parts, make) in source.family.networks.items():
        network = export_network(name, exporter(make, source, parts, "fp16"), tmp_path, Sides(64, 64, 128, 16), factor)
        assert 0 < network.parity.relative_error < 4e-3, name
        types = {one.name: one.dtype for one in network.inputs}
        assert {types[one] for one in types if one not in ("timestep", "input_ids")} <= {"float16"}
