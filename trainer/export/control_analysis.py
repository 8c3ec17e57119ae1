"""Analysis of trained control adapters, layer by layer.

A layer's change of the hidden states is multiplied by T = I + W with W = Q diag(exp(S) - 1) Q^T.
With Q = U R, U orthonormal, all of W's singular values are those of R diag(exp(S) - 1) R^T, which
is rank x rank: nothing of hidden size x hidden size is made.
"""

from dataclasses import dataclass

import torch

from headrace.trainer.export.control_file import LayerControl


@dataclass(frozen=True)
class ControlNumbers:
    """Measurements of one layer's W, T and Q."""

    layer: int
    non_orthogonality: float  # squared Frobenius norm of Q^T Q - I
    spectral_norm: float  # of W, as the next two
    frobenius_norm: float
    nuclear_norm: float
    effective_rank: float  # nuclear norm^2 / Frobenius norm^2; 0 where W is 0
    condition: float  # of T: its largest singular value over its smallest
    inverse_error: float  # Frobenius norm of T(class 1) T(class -1) - I


def analyze(control: LayerControl) -> ControlNumbers:
    """Measure one layer's adapter, in float64."""
    directions, stretches = control.directions, control.log_stretches
    triangle = torch.linalg.qr(directions, mode="r").R
    gram = directions.T @ directions
    forth, back = torch.expm1(stretches), torch.expm1(-stretches)
    values = torch.linalg.eigvalsh(triangle @ torch.diag(forth) @ triangle.T)
    singular = values.abs()
    nuclear, square = singular.sum(), singular.square().sum()
    stretched = torch.cat([1 + values, torch.ones(1, dtype=values.dtype)]).abs()
    both = torch.diag(forth + back) + forth.unsqueeze(1) * gram * back
    return ControlNumbers(
        layer=control.layer,
        non_orthogonality=float((gram - torch.eye(len(gram))).square().sum()),
        spectral_norm=float(singular.max()),
        frobenius_norm=float(square.sqrt()),
        nuclear_norm=float(nuclear),
        effective_rank=float(nuclear.square() / square) if square > 0 else 0.0,
        condition=float(stretched.max() / stretched.min()),
        inverse_error=float(torch.linalg.matrix_norm(triangle @ both @ triangle.T)),
    )
