"""The paper's claims at a scale that a laptop can repeat: `python -m benchmarks.science.run --help`."""
