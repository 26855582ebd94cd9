"""The Triton kernels of the GPU backend, one file for each kind."""
