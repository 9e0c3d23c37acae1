"""From media files and captions to cache files and batches: knows no model, imports only `utils`."""
