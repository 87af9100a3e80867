"""Trained models in use: loading, scoring, generation of text and images, reports of runs."""
