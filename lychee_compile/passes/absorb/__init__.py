"""Attend over latents in the place of keys and values that each step projects from them."""
