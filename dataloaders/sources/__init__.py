"""Sources give images as lists of names, labels and bytes: from folders, text lists, tar shards and other files."""
