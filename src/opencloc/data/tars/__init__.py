"""WebDataset tars: reading, writing, indexing and caching them."""
