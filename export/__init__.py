"""From a diffusers checkpoint to ONNX: the only stage that needs torch and diffusers."""

UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # components of a pipeline that no export reads
