"""The deployments of an application: an ingress, and one deployment per model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from runtime.lane_policy import REQUESTS_PER_LANE
from runtime.serve.ray.ingress import Ingress
from runtime.serve.ray.replica import Replica
from runtime.serve.ray.settings import SPARE_REQUESTS, ModelSettings, Settings

HEALTH_SECONDS = 5.0  # between two health checks of a replica
METRICS_SECONDS = 1.0  # between two reports of a replica's device-seconds
MOST_NODES = 1000
NODES = "runtime.serve.ray.scaling:OnePerNode"
SCALING = "runtime.serve.ray.scaling:DeviceSeconds"


def make_application(settings: Settings) -> Any:
    """The bound application, for `serve.run` and Serve's own command line."""
    models = [serve.deployment(Replica).options(**options(model, settings)) for model in settings.models]
    replicas = [one.bind(model, settings) for one, model in zip(models, settings.models, strict=True)]
    ingress = serve.deployment(serve.ingress()(Ingress)).options(
        name="Ingress", max_replicas_per_node=1, **ingresses(settings),
        max_ongoing_requests=settings.served.connections,
        ray_actor_options={"num_cpus": 0}, graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=settings.served.drain + settings.served.lane_seconds,
    )  # fmt: skip
    return ingress.bind(settings, *replicas)


def ingresses(settings: Settings) -> dict[str, Any]:
    """Ray Serve's options for the number of ingresses."""
    if settings.ingresses is not None:
        return {"num_replicas": settings.ingresses}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=1, initial_replicas=len(nodes()), max_replicas=MOST_NODES, upscale_delay_s=0,
            downscale_delay_s=0, policy=AutoscalingPolicy(policy_function=NODES),
        )
    }  # fmt: skip


def nodes() -> list[Mapping[str, float]]:
    """What the nodes of the cluster have, by Ray's names."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def options(model: ModelSettings, settings: Settings) -> dict[str, Any]:
    """Ray Serve's options of a model's deployment."""
    least, most = model.replicas
    limits, owned = settings.served, model.resources
    at_once = model.lanes * (REQUESTS_PER_LANE if "GPU" not in owned else 1) + 2
    found: dict[str, Any] = {
        "name": model.name.replace("#", "_"),
        "max_ongoing_requests": at_once + SPARE_REQUESTS,
        "max_queued_requests": limits.queue,
        "health_check_period_s": HEALTH_SECONDS,
        "health_check_timeout_s": limits.lane_seconds + HEALTH_SECONDS,
        "graceful_shutdown_wait_loop_s": 0.5,
        "graceful_shutdown_timeout_s": limits.drain,
        "ray_actor_options": {"num_cpus": owned["CPU"], "num_gpus": owned.get("GPU", 0)},
    }
    if "GPU" in owned:
        # one bundle: the cards that an actor sees are those of its own, and a bundle lies on one node
        found |= {"placement_group_bundles": [owned], "placement_group_strategy": "STRICT_PACK"}
    if least == most:
        return found | {"num_replicas": least}
    policy = AutoscalingPolicy(
        policy_function=SCALING, policy_kwargs={"seconds": model.seconds, "lanes": model.lanes}
    )  # fmt: skip
    return found | {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=least, max_replicas=most, upscale_delay_s=model.up, downscale_delay_s=model.down,
            metrics_interval_s=METRICS_SECONDS, look_back_period_s=max(model.up, 2 * METRICS_SECONDS), policy=policy,
        )
    }  # fmt: skip
