"""What a model is made of: family tables, published shapes, parameter and KV-cache accounting. Data and arithmetic, no weights."""
