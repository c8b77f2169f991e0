"""Which of several implementations of one thing a run uses, chosen once, by measuring them before its first step."""
