"""A sharing rule that hurts: only samples of the commonest class are distributed.

The control distributes samples of all classes, in the mix that the hospitals own (uniform shuffle). So the difference
shows that the samples of the rarer classes matter.

    python -m fedssg_helpers rank notebooks/examples/commonest_class.py
"""

from fedssg_helpers.sharing import supply


def rule(have, budget):
    wishes = supply(have, budget)  # images (K, C, D) that the other hospitals can learn from
    commonest = have.sum((0, 2)).argmax()
    wishes[:, :commonest] = wishes[:, commonest + 1 :] = 0
    return wishes
