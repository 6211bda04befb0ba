"""Kernels for NVIDIA GPUs in Triton.

Nothing here imports Triton until a kernel packs or runs: a machine without a GPU pays nothing and needs no Triton.
"""
