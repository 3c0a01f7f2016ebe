"""Where two runs part: from their tapes, and then computed again.

``instep diff``; `instep.equivalences` has what narrows a step to its first operation.
"""
