"""`instep check`: what Instep promises of any recipe, tried on one, each equivalence proved or refuted.

`checking` is what a program calls, and has no torch; `proving` computes, in a process of its own, with teams that it
forks (`teams`); `real` has a team of real processes lose a worker. Where two computations part, `parting` finds the
first step and tensor, `operations` the operation, and `hidden` what Python state may be the cause.
"""
