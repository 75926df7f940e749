"""The GPT that is changed: as small as the kernels take it."""

C, V = 32, 29  # width and vocabulary
SIZES = dict(block_size=8, vocab_size=V, n_layer=2, n_head=2, n_embd=C)
