"""What is compared: optimizers, smoothings of the loss, models."""
