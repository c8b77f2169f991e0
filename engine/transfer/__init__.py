"""This room has everything that starts from a pre-trained encoder: shared pieces, and a folder for each kind of run."""
