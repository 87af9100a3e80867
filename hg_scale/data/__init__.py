"""Data: from files of text to the batches of one data-parallel rank.

preparation                                           (data_prep/*.py: raw corpora to shards)
index -> order, mixture -> schedule                   (which window comes when)
schedule -> stream -> prefetch -> blocks -> shards    (training)
index -> evaluation, protocol                         (validation and test)
"""
