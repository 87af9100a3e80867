"""Raw corpora to shards.

sources -> in_order -> shard_writer                    (prepare_bytes.py)
corpus: documents, images -> shuffled -> shard_writer  (prepare_text.py, prepare_images.py)
rank_group                                             (the ranks that prepare a folder together)
"""
