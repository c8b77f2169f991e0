"""The pre-training run: its recipes, command line, task and pictures."""
