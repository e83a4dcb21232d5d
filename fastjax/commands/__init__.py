"""The commands, a module each: `run(call)` reads the flags, does it, and prints."""
