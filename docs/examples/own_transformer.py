"""The ops in a transformer that is not ours.

    python docs/examples/own_transformer.py

They are functions of tensors: the model below has its own parameter names, a window of its own
making, a scaled attention and an untied head. Its twin differs in nothing but where the functions
come from: `reference` is their definition in plain PyTorch. The two agree in loss and gradients.
"""

from types import ModuleType

import torch
from torch import Tensor, nn

from fastgpt import ops, reference

VOCABULARY, WIDTH, HEADS, LAYERS = 211, 96, 3, 3


class Layer(nn.Module):
    def __init__(self, functions: ModuleType):
        super().__init__()
        self.f = functions
        self.norm_a, self.norm_b = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(WIDTH))
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, delta: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        """The stream is delta + stream: the next norm adds what it reads anyway."""
        x, stream = self.f.add_layer_norm(delta, stream, self.norm_a)
        q, k, v = (split(part(x)) for part in (self.query, self.key, self.value))
        y = self.f.causal_attention(q, k, v, scale=1 / q.size(-1))
        x, stream = self.f.add_layer_norm(self.out(merge(y)), stream, self.norm_b)
        up, down = self.up, self.down
        return self.f.mlp(x, up.weight, up.bias, down.weight, down.bias, "tanh"), stream


def split(x: Tensor) -> Tensor:
    """(B, T, C) -> (B, H, T, D), a view: no op asks for contiguous tensors."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class Transformer(nn.Module):
    def __init__(self, functions: ModuleType):
        super().__init__()
        self.f = functions
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(functions) for _ in range(LAYERS))
        self.norm = nn.Parameter(torch.ones(WIDTH))
        self.head = nn.Parameter(torch.randn(VOCABULARY, WIDTH) / WIDTH**0.5)

    def forward(self, idx: Tensor) -> Tensor:
        """The mean loss of predicting each next token."""
        stream = self.tokens(idx[:, :-1])
        delta = torch.zeros_like(stream)
        for layer in self.layers:
            delta, stream = layer(delta, stream)
        x, _ = self.f.add_layer_norm(delta, stream, self.norm)
        return self.f.linear_cross_entropy(x.flatten(0, 1), self.head, idx[:, 1:].flatten())


def main() -> None:
    torch.manual_seed(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours, twin = Transformer(ops).to(device), Transformer(reference).to(device)
    twin.load_state_dict(ours.state_dict())
    idx = torch.randint(VOCABULARY, (2, 50), device=device)

    losses = [model(idx) for model in (ours, twin)]
    for loss in losses:
        loss.backward()
    print(f"loss {losses[0].item():.6f} on fastgpt's ops, {losses[1].item():.6f} in plain PyTorch")
    torch.testing.assert_close(losses[0], losses[1])
    for (name, p), q in zip(ours.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-5), name
    print(f"{len(list(ours.parameters()))} gradients agree")

    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-3)
    for _ in range(30):
        loss = ours(idx)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss {loss.item():.6f} after 30 steps on one batch")
    assert loss < losses[0]


if __name__ == "__main__":
    main()
