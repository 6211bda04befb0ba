"""Scripts that run under the Python of another runtime's environment; they import that runtime, numpy and `_worker`."""
