"""Triton and CUDA kernels of ego2robot, each with a CPU reference that defines its result."""
