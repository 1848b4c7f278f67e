"""From a diffusers checkpoint to ONNX: the only stage that needs torch and diffusers."""
