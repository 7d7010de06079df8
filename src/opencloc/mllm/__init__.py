"""CLOC in multimodal language models: a LLaVA whose questions can point at regions."""
