"""This room predicts a class for every pixel, by UperNet on a pre-trained encoder."""
