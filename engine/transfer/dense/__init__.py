"""Models that predict at every place of an image share this room: feature maps of an encoder and their pyramid."""
