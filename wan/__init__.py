"""The frozen models, tensors in and tensors out: DiT, VAE, T5, CLIP. Imports only utils; no dataset, no LoRA."""
