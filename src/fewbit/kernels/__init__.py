"""How a quantized matmul runs: one file per kernel, one function that selects (`dispatch.select`)."""
