"""The GPU dry run: what can be held without a GPU of a step on one."""
