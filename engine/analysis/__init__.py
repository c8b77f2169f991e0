"""This room looks inside a trained encoder: features, linear probe, nearest neighbours, the worth of each block."""
