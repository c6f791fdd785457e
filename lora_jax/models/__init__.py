"""A decoder-only transformer in Flax, named configurations of it, and text generation."""
