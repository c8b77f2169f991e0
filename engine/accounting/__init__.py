"""This room counts the cost of a model before it runs: floating-point operations and memory."""
