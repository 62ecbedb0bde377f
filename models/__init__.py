"""Model architectures as array code over :mod:`cupy_engine.layers`."""
