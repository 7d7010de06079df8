"""opencloc: contrastive localized language-image pre-training (CLOC, arXiv 2410.02746)."""

__version__ = "0.1.0"
