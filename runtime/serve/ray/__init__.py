"""The service as replicas on a Ray Serve cluster. Importing this needs no ray; making the application does."""

from __future__ import annotations

from typing import Any


def app(args: dict[str, Any]) -> Any:
    """The application of `serve run runtime.serve.ray:app` and of a Serve config's `import_path`.

    `args` are the fields of `runtime.serve.ray.settings.Settings`; EngineError for what they cannot be.
    """
    from runtime.serve.ray.application import make_application
    from runtime.serve.ray.settings import read_settings

    return make_application(read_settings(args))
