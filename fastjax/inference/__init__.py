"""Generation of text with a key-value cache."""
