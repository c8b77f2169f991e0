"""This room says what the decoders predict, and holds the loss that compares it with the target."""
