"""A sharing rule that ties: each hospital receives more of the classes that it already has.

One would expect that this hurts, because a class that a hospital lacks stays lacking there. The control distributes
samples without a choice (uniform shuffle). In both, the server first trains the model on the whole pool of samples.

    python -m fedssg_helpers rank notebooks/examples/more_of_the_same.py
"""

import numpy as np

from fedssg_helpers.sharing import supply


def rule(have, budget):
    others = supply(have, budget)  # images (K, C, D) that the other hospitals can learn from
    mix = others / np.maximum(others.sum(2, keepdims=True), 1)  # of devices, for each class
    wishes = have.sum(2, keepdims=True) * mix
    return budget.receive * wishes / np.maximum(wishes.sum((1, 2), keepdims=True), 1)
