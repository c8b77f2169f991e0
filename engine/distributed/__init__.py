"""Several ranks as one: DeepSpeed, flat gradients, the launch, the watchdog, requests to stop."""
