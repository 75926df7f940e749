"""Low-rank adapters on the fused model: what was changed steps aside, and computes the same.

    python docs/examples/lora.py

The fused path of a block stands for the modules as they were built. Replace one, and this block
runs module by module; the others stay fused. Nothing is registered or switched: the model looks.
"""

import torch
from torch import Tensor, nn

from fastgpt import GPT, GPTConfig, use_backend

RANK = 4
SIZES = GPTConfig(block_size=64, vocab_size=128, n_layer=4, n_head=4, n_embd=64)


class Adapted(nn.Module):
    """y = linear(x) + x A' B', with A (r, in) drawn and B (out, r) 0: at first nothing changes."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(RANK, linear.in_features) / linear.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(linear.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x @ self.A.T @ self.B.T

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        self.linear.weight += self.B @ self.A
        return self.linear


def loss_and_gradients(model: GPT, idx: Tensor, targets: Tensor) -> list[Tensor]:
    loss = model(idx, targets)[1]
    trained = [p for p in model.parameters() if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


def main() -> None:
    torch.manual_seed(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPT(SIZES).to(device)
    idx = torch.randint(SIZES.vocab_size, (4, SIZES.block_size), device=device)
    targets = idx.roll(-1, 1)
    plain = model(idx, targets)[1].item()

    model.requires_grad_(False)
    for block in model.transformer.h[2:]:  # the last two
        block.attn.c_attn = Adapted(block.attn.c_attn).to(device)
        block.mlp.c_fc = Adapted(block.mlp.c_fc).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    print(f"trained: {sum(p.numel() for p in trained):,} of {model.get_num_params():,} parameters")
    adapted = model(idx, targets)[1].item()
    print(f"loss {plain:.6f} as built, {adapted:.6f} with adapters that are still 0")
    assert abs(adapted - plain) < 1e-5

    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(20):
        model(idx, targets)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    ours = loss_and_gradients(model, idx, targets)
    with use_backend("torch"):  # nothing of ours, module by module
        theirs = loss_and_gradients(model, idx, targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    print(f"loss {ours[0]:.6f} after 20 steps; PyTorch alone has this loss and these gradients")
    assert ours[0] < plain

    for block in model.transformer.h[2:]:
        block.attn.c_attn = block.attn.c_attn.merged()
        block.mlp.c_fc = block.mlp.c_fc.merged()
    merged = model(idx, targets)[1].item()  # every block is as built again, and fused
    print(f"loss {merged:.6f} with the adapters merged into the weights")
    assert abs(merged - ours[0].item()) < 1e-4


if __name__ == "__main__":
    main()
