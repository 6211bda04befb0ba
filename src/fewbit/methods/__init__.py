"""Methods: how the numbers are chosen. One file per paper; tensors in, tensors out; they know no model and no file."""
