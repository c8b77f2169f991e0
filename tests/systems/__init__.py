"""The systems of the paper as whole runs: every objective on two ranks, in bf16, stopped and resumed."""
