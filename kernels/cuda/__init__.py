"""The kernels' CUDA sources live here as package data."""
