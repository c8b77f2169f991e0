"""These tools validate and re-encode data sets, measure the loader, and make the data sets of the demos."""
