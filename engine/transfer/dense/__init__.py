"""What predicts at every place of an image from a pre-trained encoder has in common: feature maps and their pyramid."""
