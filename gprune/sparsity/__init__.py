from gprune.sparsity import whole_blocks as whole_blocks  # registers the unit `blocks` and the allocation `depth`
