"""Checkpoints on disk: written by all ranks, verified, and read back under any number of ranks and ZeRO stage."""
