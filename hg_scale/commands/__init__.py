"""The verbs of `hg-scale VERB`, one module each; `main.py` dispatches to them."""
