"""What to conclude from measurements, in words and with their reasons."""
