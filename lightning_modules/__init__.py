"""Training and scoring of language models on prompts with short answers, as PyTorch Lightning modules."""
