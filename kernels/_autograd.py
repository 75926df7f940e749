"""What our autograd functions share, whether they run kernels or PyTorch's ops: needs no triton."""

import torch


def differentiable_once() -> None:
    """For the first line of a backward: refuse create_graph, as there is no second derivative.

    PyTorch's once_differentiable notices only incoming gradients that need a gradient themselves;
    with the constant one of loss.backward(create_graph=True) it would let a wrong constant through.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "fastgpt's kernels can be differentiated only once, create_graph=True asks for more; "
            'use fastgpt.use_backend("torch") for higher derivatives'
        )
