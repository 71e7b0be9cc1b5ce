"""What is worth writing by hand: closed-form gradients, and kernels for GPUs."""
