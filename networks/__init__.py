"""What is trained: low-rank branches and their files. Is handed a model and imports none; may import utils."""
