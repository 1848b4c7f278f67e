"""TensorRT and TensorRT-RTX: plans, how they are built and how they run."""
