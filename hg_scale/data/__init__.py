"""Data: from files of text to the batches of one data-parallel rank.

sources -> prepare -> shard_writer                    (data_prep/prepare_bytes.py)
corpus: documents, images -> shuffle -> shard_writer  (data_prep/prepare_text.py, prepare_images.py)
index -> order, mixture -> schedule                   (which window comes when)
schedule -> stream -> prefetch -> blocks -> shards    (training)
index -> evaluation                                   (validation and test)
"""
