"""Raw corpora to shards.

folders, signatures -> file_format -> source_summary   (which files are read, and as what)
sources -> in_order -> shard_writer                    (prepare_bytes.py)
corpus: documents, tabular, images -> shuffled -> shard_writer  (prepare_text.py, prepare_images.py)
rank_group                                             (the ranks that prepare a folder together)
"""
