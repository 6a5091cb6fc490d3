"""Triton kernels, each beside the plain-PyTorch twin that defines it, runs on CPUs, and is its test's oracle."""
