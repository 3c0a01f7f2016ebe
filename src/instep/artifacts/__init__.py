"""What a recipe leaves at its end, beside weights and figures: pictures, samples, an exported model.

`Recipe.artifacts` names a callable ``write(model, data, folder, **args)``. A process of the team calls it once, after
the last step, with the trained model in eval mode on its device, the recipe's `instep.Data`, and the folder to write
into, `artifacts/` in the run folder. Random generators are seeded by the recipe, gradients are off. It gives a mapping
of figures, numbers or text, for `result.json`, or None. What it raises is a warning: the run is done.
"""
