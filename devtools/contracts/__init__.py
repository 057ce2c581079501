"""Compares what the pack uses of other packages with their published sources, without running them.

`index` finds releases and reads files of wheels in place, `signatures` finds the definition of a name in a source tree,
`uses` lists what kernels and fakes use, `compare` makes rows of the two, `systems` does so for the names that other
systems publish, and `page` writes the outcome.
"""
