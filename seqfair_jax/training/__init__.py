"""Training: the step, the loop over epochs, selection, checkpoints."""
