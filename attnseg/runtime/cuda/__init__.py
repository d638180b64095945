"""Device memory, kernels and copies on a CUDA device; needs the extra `gpu`."""
