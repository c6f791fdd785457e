"""The file boundary: torch names, Hugging Face directories, GGUF files and pretrained models."""
