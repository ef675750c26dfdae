"""Every route to `W x + b + U C Vᵀ x` gives the same, and the cheaper ones are taken with singular vectors alone."""

import pytest
import torch

from spectralbasis.tuner.autograd import Route, cheapest_route

SHAPES = {"tall": (24, 8), "wide": (8, 24), "square": (12, 12), "nearly square": (12, 9)}


def directions(W, k=5):
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :k], Vh[:k].T


def output(route: Route, W, b, C, X):
    """`W x + b` and the update, as the route has it; C is diagonal."""

    def update(source):
        Z = source @ route.A
        return ((Z if route.offset is None else Z - route.offset) * C) @ route.B

    if route.on_input:
        return (X + update(X)) @ W.T + b
    Y = X @ W.T + b
    return Y + update(Y if route.from_output else X)


@pytest.mark.parametrize("shape", SHAPES)
def test_routes_agree(shape):
    W = torch.randn(SHAPES[shape], dtype=torch.float64)
    U, V = directions(W)
    b, C, X = (torch.randn(size, dtype=torch.float64) for size in (len(W), 5, (7, W.shape[1])))
    route = cheapest_route(W, U, V, b)
    assert (route.on_input, route.from_output) == (shape == "tall", shape == "wide")
    assert max(route.A.shape[0], route.B.shape[1]) == (min(W.shape) if "square" not in shape else max(W.shape))
    torch.testing.assert_close(output(route, W, b, C, X), X @ (W + (U * C) @ V.T).T + b)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("why", ["random directions", "turned directions", "16 bits"])
def test_other_directions_take_the_plain_route(shape, why):
    W = torch.randn(SHAPES[shape])
    U, V = directions(W)
    if why == "random directions":
        U, V = (torch.linalg.qr(torch.randn_like(factor)).Q for factor in (U, V))
    if why == "turned directions":
        V = torch.linalg.qr(V + 1e-3 * torch.randn_like(V)).Q
    if why == "16 bits":
        W, U, V = W.bfloat16(), U.bfloat16(), V.bfloat16()
    route = cheapest_route(W, U, V, None)
    assert not route.on_input
    assert not route.from_output
    assert torch.equal(route.A, V)
    assert torch.equal(route.B, U.T)
