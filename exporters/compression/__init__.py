"""Smaller models from a :class:`~exporters.checkpoint.Checkpoint`, in numpy, about a layer in memory at a time.

All of it walks the network with :mod:`.numpy_network`, and each step turns a checkpoint into another. :mod:`.shrink`
follows a recipe from end to end:

- cut: :mod:`.vocabulary` trims tokens; :mod:`.ranking` tells what each part does, :mod:`.allocation` where to cut for
  the least loss (:mod:`.latency`: what shapes cost), :mod:`.cut` is the network without it, :mod:`.repair` refits what
  is left; :mod:`.prune` puts these together;
- round: :mod:`.scaling` (AWQ), :mod:`.sensitivity` and :mod:`.budget` (mixed precision), :mod:`.rounding` (GPTQ) on
  :mod:`.grids`, along a text by :mod:`.calibrated`; :mod:`.compress` puts these together;
- measure: :mod:`.quality`.
"""
