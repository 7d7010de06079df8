"""Generated scenes: a world without limits, with exact boxes."""
