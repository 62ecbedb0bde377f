"""A torch-free LLM serving engine: paged attention, continuous batching and an OpenAI server on CuPy or NumPy."""
