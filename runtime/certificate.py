"""What an image depends on, what was measured of it, and how it compares with the image of mode `sequential`.

Classes of sameness, strongest first; each says no more than is proved:

- `identical`: sequential on one lane; made again on equal placement it is the same to the bit.
- `exact`: the sequential image but for rounding: sequential with its work dealt over several lanes, `srds` run to its
  end, `adaptive` with tolerance 0.
- `exact in distribution`: `speculative`: another image, drawn from the law that the sequential sampler draws from.
- `measured`: no guarantee; `measured` holds the numbers that are known, and `python -m runtime verify` makes more.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from engines.base import Array
from engines.manifest import Manifest
from runtime.call import OPTIONS, Call, CheckedCall
from runtime.sampling.operations import Options

IDENTICAL, EXACT, IN_DISTRIBUTION, MEASURED = "identical", "exact", "exact in distribution", "measured"


def model_sha256(manifest: Manifest) -> str:
    """Identifies a model by its content: networks with their weights, tokenizers, scheduler and all else it says."""
    content = manifest.model_dump(mode="json", exclude={"origin", "versions", "networks"})
    content["networks"] = {name: network.sha256 for name, network in manifest.networks.items()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def array_sha256(value: Array) -> str:
    """Of the shape and the numbers in float32, C order."""
    value = np.ascontiguousarray(value, np.float32)
    return hashlib.sha256(repr(value.shape).encode() + value.tobytes()).hexdigest()


def sameness(mode: str, options: Options, lanes: int) -> str:
    """The class that follows from how an image was made."""
    if options.cache_interval > 1:
        return MEASURED
    if mode == "speculative":
        return IN_DISTRIBUTION
    if mode == "sequential":
        return IDENTICAL if lanes == 1 else EXACT
    to_the_end = mode == "srds" and options.iterations is None
    return EXACT if (to_the_end or mode == "adaptive") and options.tolerance == 0 else MEASURED


def arguments(call: Call) -> tuple[dict[str, Any], dict[str, str]]:
    """The arguments of a call that are not the defaults, as JSON has them, and the SHA-256 of arrays and images."""
    plain: dict[str, Any] = {}
    hashes: dict[str, str] = {}
    for name, option in OPTIONS.items():
        value = getattr(call, name)
        if isinstance(value, np.ndarray):
            hashes[name] = array_sha256(value)
        elif name == "image" and value is not None:
            images = [value] if isinstance(value, Image.Image) else list(value)
            parts = [repr((one.mode, one.size)).encode() + one.tobytes() for one in images]
            hashes[name] = hashlib.sha256(b"".join(parts)).hexdigest()
        elif isinstance(value, tuple | list):
            plain |= {name: list(value)} if value else {}
        elif value != option.default:
            plain[name] = value
    return plain, hashes


def certificate(
    call: CheckedCall, model: str, precision: str, plan: str, placement: str, mode: str, options: Options, lanes: int,
    latents: Array, measured: Mapping[str, float] | None, size: tuple[int, int],
) -> dict[str, Any]:  # fmt: skip
    """As JSON. `model`: its `model_sha256`. `plan`: key of the compiled denoiser. `placement`: the lanes that were
    loaded, and their threads. `lanes`: how many of them were used. `size`: width and height in pixels.

    `inputs` has the hashes of what a report cannot hold: latents, images and embeddings that were given.
    """
    given, inputs = arguments(call)
    given |= {"mode": mode, "k": options.k, "drafts": options.drafts, "seed": call.seed}
    given |= {"cache_interval": options.cache_interval} if options.cache_interval > 1 else {}
    given |= dict(zip(("width", "height"), size, strict=True))
    # in one order, so that a size that is the default makes the same file whether it was named or not
    given = {name: given[name] for name in OPTIONS if name in given and name not in ("timeline", "lanes", "priority")}
    return {
        "sameness": sameness(mode, options, lanes), "measured": dict(measured) if measured else None,
        "model_sha256": model, "plan": plan, "precision": precision, "placement": placement,
        "lanes": call.lanes,
        "arguments": given, "inputs": inputs, "latents_sha256": array_sha256(latents),
    }  # fmt: skip
