"""Text: tokenizer files, chat templates, sampling with masked language models."""
