"""Data: from text files to the batches of one data-parallel rank.

preparation                                                 (data_prep/*.py: raw corpora to shards)
index -> order, mixture -> sequence_schedule                (the order of the training sequences)
sequence_schedule -> stream -> prefetch -> blocks -> shards (training batches)
index -> evaluation, protocol                               (validation and test)
"""
