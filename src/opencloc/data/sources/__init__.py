"""Where samples come from: a file for each kind; `spec` opens any of them by name."""
