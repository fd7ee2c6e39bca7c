"""Muon: momentum, made orthogonal by a few steps of a Newton-Schulz iteration, for the matrices between
layers."""

import torch

COEFFICIENTS = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]


@torch.compile
def orthogonal(gradient):
    x = gradient.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in COEFFICIENTS:
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).float()


class Muon:
    """`shape` tells which matrices hold experts side by side: those are treated one by one."""

    def __init__(self, parameters, shape):
        self.parameters, self.shape = parameters, shape
        self.momenta = [torch.zeros_like(parameter) for parameter in parameters]

    @torch.no_grad()
    def step(self, rate):
        for parameter, momentum in zip(self.parameters, self.momenta, strict=True):
            momentum.lerp_(parameter.grad, 0.05)
            update = self.split(parameter.grad.lerp(momentum, 0.95)).contiguous()
            update = orthogonal(update) * (0.2 * max(update.shape[-2:]) ** 0.5)
            if parameter.shape[1] == self.expert_width:
                update = update.transpose(0, 1)
            parameter.mul_(1 - rate * 0.1).add_(update.reshape(parameter.shape), alpha=-rate)

    @property
    def expert_width(self):
        return self.shape.experts * self.shape.intermediate

    def split(self, matrix):
        """[pieces, rows, columns]"""
        experts, width = self.shape.experts, self.shape.intermediate
        if matrix.shape[0] == self.expert_width:
            return matrix.view(experts, width, -1)
        if matrix.shape[1] == self.expert_width:
            return matrix.view(matrix.shape[0], experts, width).transpose(0, 1)
        return matrix[None]
