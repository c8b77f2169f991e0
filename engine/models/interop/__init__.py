"""Weights of other projects under our names, and ours under theirs."""
