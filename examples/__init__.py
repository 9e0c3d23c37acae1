"""Worlds to try the trainer on; may import anything of the project, and nothing of the project imports them."""
