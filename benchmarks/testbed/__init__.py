"""A small-scale replica of the paper's setting: a real LLM, three specialists, real biology data, all from PyPI."""
