"""Images with captions and region texts: contracts, readers, generated worlds."""
