"""The embedded model in fp16, and the GPUs that plans are for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from engines.nvidia import Gpu
from engines.store import BUILD, Bundle
from tests import ROOT

NETWORKS = ("text_encoder", "denoiser", "vae_decoder", "vae_encoder")
H200 = Gpu("NVIDIA H200", (9, 0), "580.1")
RTX = Gpu("NVIDIA GeForce RTX 4090", (8, 9), "580.1")


@pytest.fixture(scope="session")
def fp16_bundle() -> Bundle:
    """The embedded model in fp16."""
    command = [sys.executable, "-m", "export", "shapes", "--devices", "cuda:0"]
    subprocess.run(command, check=True, cwd=ROOT)
    return Bundle.open("shapes", BUILD, "fp16")
