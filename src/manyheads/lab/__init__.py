"""Kernels without a GPU: compile them ahead of time, hold their resources, check their source, search their tiles.

``aot`` compiles one kernel for one target and reports what it needs; ``registry`` lists every kernel of every engine
with the cases to compile; ``gate`` compiles the cases and compares with the checked-in table ``resources.tsv``;
``rules`` reads the source of the kernels; ``search`` chooses configurations from compiled resources, ``tune`` from
measurements. Importing any of these imports no Triton: compiling happens in processes of its own.
"""
