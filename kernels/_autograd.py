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


def graph_is_kept() -> bool:
    """In a backward: whether another may follow on the same graph (retain_graph=True). If none can,
    a saved tensor may be given away as a gradient.
    """
    return torch._C._autograd._get_current_graph_task_keep_graph()
