"""Fused kernels for multimodal models: native on the CPU and the GPU, behind a thin PyTorch API."""

__version__ = "0.1.0"
