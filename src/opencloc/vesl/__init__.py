"""VESL, the label engine: captions, phrases, detection, filters, shards, runs (paper section 4)."""
