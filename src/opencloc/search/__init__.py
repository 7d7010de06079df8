"""A library of photos that can be asked: an index of their regions, queries of it, embeddings as files, a web page."""
