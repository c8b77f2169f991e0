"""Each command of `mirl` that is not a training run has one file here."""
