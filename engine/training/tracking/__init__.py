"""Trackers beside TensorBoard: Weights & Biases and MLflow, each in a thread that can fail without the run noticing."""
