"""CUDA C++ sources, read as text by :mod:`cupy_engine.ops`. No Python logic here."""
