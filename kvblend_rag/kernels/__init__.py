"""GPU kernels (Triton); each has a plain PyTorch path that everything else runs on."""
