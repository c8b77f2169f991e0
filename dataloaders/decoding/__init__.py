"""Turn the bytes of an image into a crop of pixels."""
