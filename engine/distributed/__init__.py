"""This room makes several ranks one: DeepSpeed, flat gradients, the launch, the watchdog, requests to stop."""
