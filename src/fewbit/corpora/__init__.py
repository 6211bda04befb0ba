"""What text is read: files, and the held-out modules of the standard library. Knows no tokenizer and no model."""
