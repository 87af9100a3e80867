"""The Hourglass: what a configuration's `model` section means, in plain PyTorch.

plan, costs, layer_table                          (the list of layers, their cost; no torch)
hourglass -> block, resampling -> attention       (the modules, in the order of the plan)
grouping, positions, banded                       (groups and the causal shift; positions; windows)
layers, sharding, initialization                  (the layers factory, slices, initial weights)
decoding -> cache, sampling                       (generating token by token)
"""
