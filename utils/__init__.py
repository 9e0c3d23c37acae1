"""Options, errors, files, devices, logs: knows neither Wan nor diffusion, and imports nothing of the project."""
