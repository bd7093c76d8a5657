"""C kernels for CPUs, one extension module a source file; optional, see setup.py."""
