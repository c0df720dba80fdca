"""Learning from what the model itself writes."""
