"""What PNG files say of how they were made: text chunks that A1111, ComfyUI and tools like them read."""

from __future__ import annotations

import json
from typing import Any

from PIL.PngImagePlugin import PngInfo

from runtime.provenance import engine_version
from runtime.report import Report

# as A1111 calls them; others keep their own names
SAMPLERS = {
    "ddim": "DDIM", "ddpm": "DDPM", "euler": "Euler", "euler_a": "Euler a", "dpm++2m": "DPM++ 2M",
    "dpm++2m_sde": "DPM++ 2M SDE", "lcm": "LCM",
}  # fmt: skip
HASH_LENGTH = 10
RUN = ("measured", "latents_sha256", "lanes")  # parts of a certificate that belong to one run


def parameters(report: Report, image: int) -> str:
    """The `parameters` chunk: prompt, negative prompt, then pairs in one line."""
    given = report.certificate["arguments"]
    prompt = given.get("prompt", "")
    prompts = prompt if isinstance(prompt, list) else [prompt]
    lines = [prompts[image // max(1, report.images // len(prompts))]]
    if given.get("negative_prompt"):
        lines.append(f"Negative prompt: {given['negative_prompt']}")
    pairs: dict[str, Any] = {
        "Steps": report.steps, "Sampler": SAMPLERS.get(report.scheduler, report.scheduler),
        "CFG scale": f"{report.guidance_scale:g}", "Seed": report.seed, "Size": f"{report.width}x{report.height}",
        "Model hash": report.certificate["model_sha256"][:HASH_LENGTH], "Model": report.model,
    }  # fmt: skip
    pairs |= {"Denoising strength": f"{given['strength']:g}"} if "strength" in given else {}
    pairs |= {"Eta": f"{given['eta']:g}"} if "eta" in given else {}
    pairs |= {"Batch pos": image, "Batch size": report.images} if report.images > 1 else {}
    pairs |= {"Mode": report.mode, "Drafts per round": report.k, "Drafts": report.drafts}
    pairs |= {"Sameness": report.certificate["sameness"], "Version": f"driffusion-engine {engine_version()}"}
    return "\n".join([*lines, ", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items())])


def png_info(report: Report, image: int) -> PngInfo:
    """The chunks of the n-th image of a call: `parameters`, and `driffusion`, the certificate as JSON.

    What was measured is left out: a share of the lanes that changes under load may change it by a rounding, and equal
    pixels shall be equal files.
    """
    info = PngInfo()
    said = {name: value for name, value in report.certificate.items() if name not in RUN}
    info.add_text("parameters", parameters(report, image))
    info.add_text("driffusion", json.dumps({"image": image} | said, ensure_ascii=False))
    return info


def _quoted(value: Any) -> str:
    """As A1111 writes values, so that commas and colons in them end no pair."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text
