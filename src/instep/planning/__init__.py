"""`instep plan`: which rule, how many workers and how often a checkpoint, for a cluster that is described."""
