"""What 4-bit bytes mean, and multiplying by them."""
