"""The checkpoint format: written in one layout, read in any.

fragments                                     (which elements of which parameter a rank holds)
local_state -> rank_file -> save              (from the optimizer to files, committed by a rename)
manifest, checksum, safetensors_file          (the format)
find -> load                                  (the newest complete checkpoint, and its elements)
retention, run_tokenizer                      (which are kept; the tokenizer of a run)
"""
