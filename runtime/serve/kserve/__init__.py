"""The Open Inference Protocol (KServe v2), as Triton's clients speak it."""
