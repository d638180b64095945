"""What runs on a CUDA device; needs the extra `gpu`."""
