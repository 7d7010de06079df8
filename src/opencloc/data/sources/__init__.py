"""Where samples come from, each kind in a file of its own; `spec` opens them by name."""
