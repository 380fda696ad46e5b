"""Contrastive and generative training under DeepSpeed, through one gradient-cached step."""
