"""Measures of a model: what a run is judged by, during training and after it."""
