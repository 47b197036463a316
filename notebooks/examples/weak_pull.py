"""A gradient that ties: FedProx with a pull that is too weak to change anything, against logit adjustment without it.

FedProx (Li et al. 2020, arXiv 1812.06127) pulls each hospital's weights back to where the round started. Useful strengths
mu lie around 0.01. With 0.0001 only rounding errors grow, so the difference shows how much two equal methods differ.

    python -m fedssg_helpers rank notebooks/examples/weak_pull.py
"""

from dataclasses import dataclass

from fedssg_helpers.methods import LogitAdjusted, Method, Plain


@dataclass(frozen=True)
class Pull(Plain):
    mu: float = 0.0001

    def __call__(self, grad, weights, start, correction):
        grad.add_(weights - start, alpha=self.mu)


METHOD = Method(loss=LogitAdjusted(), gradient=Pull())
