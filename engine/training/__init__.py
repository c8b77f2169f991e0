"""What every training run shares: the order of a run, the loop and its tasks, schedule, optimiser, log, compilation."""
