"""What the decoders predict, and the loss that compares it with the target."""
