"""Training: losses, optimizers, the jitted step, the loop, and what is written about a run."""
