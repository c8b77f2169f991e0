"""One file for each command of `mirl` that is not a training run."""
