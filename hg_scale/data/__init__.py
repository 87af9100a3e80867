"""Data: from files of text to the batches of one data-parallel rank.

sources -> prepare -> shards + index                  (data_prep/*.py, once)
index -> order, mixture -> schedule                   (which window comes when)
schedule -> stream -> prefetch -> blocks -> shards    (training)
index -> evaluation                                   (validation and test)
"""
