"""All ranks write a checkpoint here; it is verified, and any number of ranks and any ZeRO stage reads it back."""
