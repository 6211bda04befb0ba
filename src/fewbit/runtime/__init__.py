"""What a model sees: quantization configuration, linear methods, KV cache, load, generate."""
