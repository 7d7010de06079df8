"""The CLOC model: towers, Prompter, box head, and what turns images and strings into its tensors.

Importing any part of it registers `ClocConfig`, `ClocModel` and `ClocProcessor` with transformers' Auto classes.
"""

import opencloc.model.processor  # noqa: F401
