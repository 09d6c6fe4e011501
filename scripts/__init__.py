"""Commands beside run.py, started with `python -m scripts.NAME` from the repository's root."""
