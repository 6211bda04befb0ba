"""What lies on disk: one file per checkpoint layout, lazy safetensors shards, output directories that appear only when they are whole."""
