"""Special tokens, tokenizers, and a view of what they do."""
