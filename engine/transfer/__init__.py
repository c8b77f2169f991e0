"""Everything that starts from a pre-trained encoder: pieces that all such runs share, and a folder for each kind."""
