"""Parameters, buffers and attributes: tied, frozen, of other dtypes and layouts, poked at."""

import copy
import pickle

import torch
from torch import nn

from tests.forks.changes.sizes import C, V


class Subclass(torch.Tensor):
    """As quantisation libraries have them: another matmul under the same name."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        y = super().__torch_function__(function, types, args, kwargs or {})
        if function is torch.nn.functional.linear:
            return 2 * y.as_subclass(torch.Tensor)
        return y


class Temperature(nn.Module):
    def __init__(self, head, model):
        super().__init__()
        self.head, self.scale = head, [model.scale]

    def forward(self, x):
        return self.head(x) * self.scale[0].to(x.dtype)


def in_dtype(module, dtype):
    """The module in a dtype of its own, between tensors of another one."""
    module.to(dtype)
    module.register_forward_pre_hook(lambda m, x: (x[0].to(dtype),))
    module.register_forward_hook(lambda m, x, y: y.float())


def replace_parameters(module, make):
    for part in module.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            setattr(part, name, make(p))


def block_used_twice(model, undo):
    model.transformer.h[1] = model.transformer.h[0]


def mlp_used_twice(model, undo):
    model.transformer.h[1].mlp = model.transformer.h[0].mlp


def norm_used_everywhere(model, undo):
    for block in model.transformer.h:
        block.ln_1 = block.ln_2 = model.transformer.ln_f


def linear_used_twice(model, undo):
    model.transformer.h[1].attn.c_proj = model.transformer.h[0].attn.c_proj


def weight_used_twice(model, undo):
    first, second = model.transformer.h
    second.mlp.c_fc.weight = first.mlp.c_fc.weight
    second.ln_2.bias = first.mlp.c_proj.bias


def weight_used_twice_in_one_block(model, undo):
    block = model.transformer.h[0]
    block.ln_2.weight = block.ln_1.weight
    block.ln_2.bias = block.ln_1.bias


def positions_tied_to_tokens(model, undo):
    model.transformer.wpe.weight = model.transformer.wte.weight


def frozen_blocks(model, undo):
    model.transformer.h.requires_grad_(False)


def frozen_embeddings(model, undo):
    model.transformer.wpe.requires_grad_(False)
    model.lm_head.requires_grad_(False)


def only_norms_learn(model, undo):
    model.requires_grad_(False)
    for block in model.transformer.h:
        block.ln_1.requires_grad_(True)


def one_frozen_bias(model, undo):
    model.transformer.h[0].mlp.c_fc.bias.requires_grad_(False)


def doubles(model, undo):
    model.double()


def bfloat16(model, undo):
    model.bfloat16()


def float16(model, undo):
    model.half()


def one_bfloat16_block(model, undo):
    in_dtype(model.transformer.h[0], torch.bfloat16)


def bfloat16_block_behind_a_wider_one(model, undo):
    in_dtype(model.transformer.h[1], torch.bfloat16)


def bfloat16_embeddings(model, undo):
    """The first parameter is of another dtype than all the others."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.transformer.wte.to(torch.bfloat16)
    model.transformer.wte.register_forward_hook(lambda m, x, y: y.float())


def double_head(model, undo):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().double())
    model.lm_head.register_forward_pre_hook(lambda m, x: (x[0].double(),))


def double_norms(model, undo):
    for block in model.transformer.h:
        in_dtype(block.ln_1, torch.float64)


def double_block(model, undo):
    """Without a hook in the way: matmuls of mixed dtypes fail in nanoGPT."""
    model.transformer.h[1].double()


def bfloat16_scalar_first(model, undo):
    model.scale = nn.Parameter(torch.tensor(0.5, dtype=torch.bfloat16))
    model.lm_head = Temperature(model.lm_head, model)


def double_vector_first(model, undo):
    model.register_parameter("extra", nn.Parameter(torch.ones(5, dtype=torch.float64)))


def unused_meta_parameter_first(model, undo):
    model.register_parameter("extra", nn.Parameter(torch.ones(3, device="meta")))


def meta_block(model, undo):
    model.transformer.h[1].to("meta")


def no_parameters(model, undo):
    """Weights as buffers, as after quantising."""
    tied = model.lm_head.weight.detach()
    for part in model.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, tied if p.shape == tied.shape else p.detach())


def plain_tensors_for_weights(model, undo):
    """What FSDP and functional_call leave in a module while it runs."""
    linear = model.transformer.h[0].mlp.c_fc
    weight = linear.weight
    del linear.weight
    linear.source = weight
    linear.weight = weight * 1.0


def weight_made_of_others(model, undo):
    """Not a leaf: the gradient goes on to what it was made of."""
    head = model.lm_head
    model.factor = nn.Parameter(torch.randn(V, 4))
    model.other = nn.Parameter(torch.randn(4, C) / 4)
    made = model.factor @ model.other
    for module in (head, model.transformer.wte):
        del module.weight
        module.weight = made


def tensor_subclass(model, undo):
    linear = model.transformer.h[0].mlp.c_fc
    weight = linear.weight.detach().as_subclass(Subclass)
    linear.weight = nn.Parameter(weight)


def transposed_weights(model, undo):
    for block in model.transformer.h:
        replace_parameters(block.mlp, lambda p: nn.Parameter(p.detach().t().clone().t()))


def strided_weights(model, undo):
    def strided(p):
        wide = torch.stack([p.detach(), p.detach()], dim=-1)
        return nn.Parameter(wide[..., 0])

    replace_parameters(model.transformer.h[0], strided)


def strided_vectors(model, undo):
    """Columns of one matrix, say; in all layers, and no matrix beside them."""

    def strided(p):
        if p.dim() > 1:
            return p
        return nn.Parameter(torch.stack([p.detach() + 0.5, 7 * p.detach()], dim=-1)[..., 0])

    replace_parameters(model, strided)


def one_number_for_biases(model, undo):
    """Not leaves, without memory of their own for each element."""
    model.one = nn.Parameter(torch.full((), 0.3))
    for module in model.modules():
        if getattr(module, "bias", None) is not None:
            shape = module.bias.shape
            del module.bias
            module.bias = model.one.expand(shape)


def quantised_in_the_forward(model, undo):
    """The backward has the weights that the forward had, though they are back in their places."""
    kept = {}

    def quantise(module, args):
        for p in model.parameters():
            kept[p], p.data = p.data, (4 * p.data).round() / 4

    def give_back(module, args, output):
        for p, data in kept.items():
            p.data = data

    model.register_forward_pre_hook(quantise)
    model.register_forward_hook(give_back)


def sparse_matrix(model, undo):
    linear = model.transformer.h[0].mlp.c_fc
    linear.weight = nn.Parameter(linear.weight.detach().to_sparse_csr(), requires_grad=False)


def assigned_state(model, undo):
    state = {name: t.clone() / 2 for name, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def assigned_data(model, undo):
    for p in model.parameters():
        p.data = p.data / 2


def deep_copy(model, undo):
    return copy.deepcopy(model)


def pickled(model, undo):
    return pickle.loads(pickle.dumps(model))


def extra_parameter(model, undo):
    model.transformer.h[0].attn.register_parameter("sink", nn.Parameter(torch.zeros(4)))


def extra_buffer(model, undo):
    model.transformer.h[0].attn.register_buffer("bias", torch.ones(1, 1, 8, 8).tril())


def slow_attention(model, undo):
    for block in model.transformer.h:
        block.attn.flash = False
        block.attn.register_buffer("bias", torch.ones(1, 1, 8, 8).tril())


def slow_attention_with_a_window(model, undo):
    attn = model.transformer.h[0].attn
    attn.flash = False
    attn.register_buffer("bias", torch.ones(1, 1, 8, 8).tril().triu(-2))


def slow_attention_with_dropout(model, undo):
    attn = model.transformer.h[0].attn
    attn.flash, attn.attn_dropout.p = False, 0.3
    attn.register_buffer("bias", torch.ones(1, 1, 8, 8).tril())


def slow_attention_without_a_mask(model, undo):
    model.transformer.h[0].attn.flash = False


def more_heads_in_one_layer(model, undo):
    model.transformer.h[1].attn.n_head = 4


def heads_of_the_config(model, undo):
    model.config.n_head = 4


def dropout_of_the_config(model, undo):
    model.config.dropout = 0.5


def vocabulary_of_the_config(model, undo):
    model.config.vocab_size = 7


def layers_of_the_config(model, undo):
    model.config.n_layer = 1


def width_of_the_config(model, undo):
    model.config.n_embd = 64


def block_size_of_the_config(model, undo):
    model.config.block_size = 6


def larger_block_size_of_the_config(model, undo):
    model.config.block_size = 12


def width_of_one_attention(model, undo):
    model.transformer.h[0].attn.n_embd = C // 2


def dropout_in_one_mlp(model, undo):
    model.transformer.h[0].mlp.dropout.p = 0.4


def dropout_of_attention(model, undo):
    for block in model.transformer.h:
        block.attn.dropout = 0.4


def dropout_of_embeddings(model, undo):
    model.transformer.drop.p = 0.4


def dropout_of_everything(model, undo):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 1.0


def dropout_in_place(model, undo):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.inplace, module.p = True, 0.2


def dropout_when_sampling(model, undo):
    dropout = model.transformer.h[0].mlp.dropout
    dropout.p = 0.3
    dropout.eval = dropout.train = lambda mode=True: dropout


def no_dropout_module(model, undo):
    for block in model.transformer.h:
        block.mlp.dropout = block.attn.resid_dropout = nn.Identity()


def alpha_dropout(model, undo):
    model.transformer.h[0].mlp.dropout = nn.AlphaDropout(0.2)


def padding_token(model, undo):
    model.transformer.wte.padding_idx = 3


def bounded_embeddings(model, undo):
    model.transformer.wte.max_norm = 0.5


def bounded_positions(model, undo):
    model.transformer.wpe.max_norm = 0.5


def gradient_by_frequency(model, undo):
    model.transformer.wte.scale_grad_by_freq = True


def sparse_positions(model, undo):
    model.transformer.wpe.sparse = True


def embedding_of_options(model, undo):
    wte = nn.Embedding(V, C, padding_idx=2, max_norm=1.0, norm_type=1.0)
    wte.weight = model.lm_head.weight
    model.transformer.wte = wte


CHANGES = (
    block_used_twice, mlp_used_twice, norm_used_everywhere, linear_used_twice, weight_used_twice,
    weight_used_twice_in_one_block, positions_tied_to_tokens, frozen_blocks, frozen_embeddings,
    only_norms_learn, one_frozen_bias, doubles, bfloat16, float16, one_bfloat16_block,
    bfloat16_block_behind_a_wider_one, bfloat16_embeddings, double_head, double_norms, double_block,
    bfloat16_scalar_first, double_vector_first, unused_meta_parameter_first, meta_block,
    no_parameters, plain_tensors_for_weights, weight_made_of_others, tensor_subclass,
    transposed_weights, strided_weights, strided_vectors, one_number_for_biases, sparse_matrix,
    quantised_in_the_forward, assigned_state, assigned_data, deep_copy, pickled,
    extra_parameter, extra_buffer, slow_attention, slow_attention_with_a_window,
    slow_attention_with_dropout, slow_attention_without_a_mask, more_heads_in_one_layer,
    heads_of_the_config, dropout_of_the_config, vocabulary_of_the_config, layers_of_the_config,
    width_of_the_config, block_size_of_the_config, larger_block_size_of_the_config,
    width_of_one_attention, dropout_in_one_mlp, dropout_of_attention, dropout_of_embeddings,
    dropout_of_everything, dropout_in_place, dropout_when_sampling, no_dropout_module,
    alpha_dropout, padding_token, bounded_embeddings, bounded_positions, gradient_by_frequency,
    sparse_positions, embedding_of_options,
)  # fmt: skip
