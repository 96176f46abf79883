"""Sharing a model: a folder of safetensors, config and model card, here or on the Hugging Face hub."""
