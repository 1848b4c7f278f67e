"""Feature caching (DeepCache, CVPR 2024): whether a model on its lanes can do it, and what features look like."""

from __future__ import annotations

from engines.batches import FeatureShape
from engines.errors import ParameterError
from engines.manifest import SHALLOW, Manifest
from engines.runtimes import RUNTIMES


def feature_shape(manifest: Manifest) -> FeatureShape:
    """For a bundle whose denoiser is there in two parts."""
    spec = next(one for one in manifest.networks[SHALLOW].inputs if one.name == "features")

    def shape(sample: tuple[int, ...]) -> tuple[int, ...]:
        return spec.resolve({"batch": sample[0], "height": sample[-2], "width": sample[-1]})

    return shape


def check_cache(interval: int, manifest: Manifest, runtime: str) -> None:
    """ParameterError where a model or its lanes cannot reuse features."""
    if interval == 1:
        return
    if not manifest.caches:
        command = f"make engines MODEL={manifest.origin.removesuffix(' CACHE=1')} CACHE=1"
        raise ParameterError(
            "cache_interval", f"{manifest.model} was exported without what cache_interval needs: `{command}` makes it"
        )
    if not RUNTIMES[runtime].caches:
        able = " or ".join(f"{one.device}@{one.option}" for one in RUNTIMES.values() if one.caches)
        raise ParameterError(
            "cache_interval", f"lanes of {RUNTIMES[runtime].title} cannot reuse features: use --devices {able}"
        )
