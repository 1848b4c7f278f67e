"""Model families: which networks a diffusers pipeline is made of, and what the runtime must know of it.

A family is a file with an entry, and the runtime never asks for its name: what is special to it went into the graphs of
its networks or is a field of the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping

from engines.errors import ExportError
from export.families.base import Family, Sides, Text
from export.families.flux import FLUX
from export.families.flux2 import FLUX2_KLEIN
from export.families.qwen_image import QWEN_IMAGE
from export.families.stable_diffusion import LATENT_CONSISTENCY, STABLE_DIFFUSION
from export.families.stable_diffusion_3 import STABLE_DIFFUSION_3
from export.families.stable_diffusion_xl import STABLE_DIFFUSION_XL
from export.families.z_image import Z_IMAGE

__all__ = ["FAMILIES", "STABLE_DIFFUSION", "Family", "Sides", "Text", "family_of"]

FAMILIES: Mapping[str, Family] = {
    "StableDiffusionPipeline": STABLE_DIFFUSION,
    "StableDiffusionImg2ImgPipeline": STABLE_DIFFUSION,
    "StableDiffusionXLPipeline": STABLE_DIFFUSION_XL,
    "StableDiffusionXLImg2ImgPipeline": STABLE_DIFFUSION_XL,
    "StableDiffusion3Pipeline": STABLE_DIFFUSION_3,
    "StableDiffusion3Img2ImgPipeline": STABLE_DIFFUSION_3,
    "FluxPipeline": FLUX,
    "Flux2KleinPipeline": FLUX2_KLEIN,
    "QwenImagePipeline": QWEN_IMAGE,
    "ZImagePipeline": Z_IMAGE,
    "LatentConsistencyModelPipeline": LATENT_CONSISTENCY,
}


def family_of(name: object, folder: object) -> Family:
    """The entry of a pipeline's class; ExportError with those that there are."""
    found = FAMILIES.get(str(name))
    if found is None:
        raise ExportError(f"{folder} holds a {name}; this version exports {', '.join(FAMILIES)}")
    return found
