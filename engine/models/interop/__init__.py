"""This room reads the weights of other projects under our names, and writes ours under theirs."""
