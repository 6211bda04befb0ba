"""One file per command: where the layers are joined. This is the Python API behind the command line."""
