"""From the bytes of an image to a crop of pixels."""
