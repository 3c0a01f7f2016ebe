"""A run in one process: computed again from its tape, or on a virtual clock."""
