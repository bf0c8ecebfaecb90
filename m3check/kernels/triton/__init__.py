"""Our own Triton kernels: a file an op, named like the reference beside it. Importing this package imports no triton."""
