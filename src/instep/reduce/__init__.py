"""Many gradients into one, in an order that the recipe fixes: the canonical tree, over shared memory."""
