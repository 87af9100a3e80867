"""Everything else that reads or writes weights: exports, imports, comparisons.

open -> source and its subclasses             (weights of any kind by name, a piece at a time)
export, huggingface -> bundle, model_card     (folders that load without this package)
to_checkpoint, universal                      (checkpoints of ours, and of DeepSpeed)
average, compare, health, inspection          (what `hg-scale convert` computes and prints)
"""
