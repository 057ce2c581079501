"""Compares what the pack uses of other people's packages with their published sources, without running them.

`index` finds releases and reads files of wheels in place, `signatures` says what a name of a source tree is, `uses` is
what kernels and fakes use, `compare` makes rows of the two, `systems` does so for the names that other systems publish,
and `page` writes the outcome.
"""
