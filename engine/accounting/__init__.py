"""What a model costs, counted before it runs: floating-point operations and memory."""
