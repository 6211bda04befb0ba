"""Other people's runtimes, each in its own environment and process: vLLM, llama.cpp, transformers with its quantizers, OpenVINO."""
