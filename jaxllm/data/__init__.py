"""Documents to tokens to packed, shuffled, resumable batches. No file here imports jax."""
