"""Measure the project against diffusers on the same weights and inputs: seconds, bytes and their ratios, one table.

python -m bench --all --json rows.json
python -m bench --only dit denoise --quick

Each table also stands alone: python -m bench.dit
"""

from bench import caching, denoise, dit, loading, measure, swapping, training, vae

TABLES: dict[str, measure.Table] = {
    "dit": dit.rows,
    "denoise": denoise.rows,
    "training": training.rows,
    "swapping": swapping.rows,
    "vae": vae.rows,
    "loading": loading.rows,
    "caching": caching.rows,
}

if __name__ == "__main__":
    measure.main(__doc__, TABLES)
