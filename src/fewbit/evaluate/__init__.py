"""What a quantization costs in quality: perplexity, KL divergence and flips, each with an interval."""
