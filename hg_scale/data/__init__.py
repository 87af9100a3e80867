"""Data: from files of text to the batches of one data-parallel rank.

sources -> prepare -> shards + index      (data_prep/*.py, once)
index -> order -> stream -> prefetch      (training)
index -> evaluation                       (validation and test)
"""
