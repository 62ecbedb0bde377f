"""One file per op family: the public function, its NumPy reference, its CUDA launch."""
