"""What each model family is made of, its presets, and how a decoder is built."""
