"""Looking at data sets: figures, contact sheets, packing."""
