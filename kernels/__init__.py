"""Triton kernels, one file an op, imported as ``mlmfast.kernels``; this version has none yet."""
