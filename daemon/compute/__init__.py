"""This host's devices and the worker processes that compute on them."""
