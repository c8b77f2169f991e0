"""What looks inside a trained encoder: features, a linear probe, nearest neighbours, and what each block is worth."""
