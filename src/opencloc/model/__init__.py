"""The CLOC model: towers, Prompter, box head, and what turns images and strings into its tensors."""
