"""Where images come from: folders, text lists and tar shards, each as a list of names, labels and bytes."""
