"""This room has the checkpoints on disk: all ranks write one; it is verified, and read by any ranks and ZeRO stage."""
