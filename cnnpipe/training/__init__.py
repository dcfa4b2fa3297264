"""Training: batches and their augmentation, and the loop."""
