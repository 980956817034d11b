"""Triton kernels between and inside the layers, for one NVIDIA GPU."""
