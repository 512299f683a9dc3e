"""Pictures, clips and prompts to what the transformer is given, and latents back to pictures."""
