"""Hooks: on any module, on all, on parameters, and autograd's."""

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules import module as global_hooks


def double_output(module, inputs, output):
    return 2 * output


def halve_input(module, inputs):
    return (inputs[0] / 2,)


def steer(module, inputs, output):
    """Add to one position alone: with a cache it would be another one."""
    output = output.clone()
    output[:, 2, ::3] += 1.0
    return output


def noise(module, inputs, output):
    return output + torch.randn_like(output) / 4 if module.training else output


def halve_gradient(module, grad_inputs, grad_outputs):
    return tuple(None if g is None else g / 2 for g in grad_inputs)


def halve_incoming(module, grad_outputs):
    return tuple(g / 2 for g in grad_outputs)


def doubled_mlp(model, undo):
    model.transformer.h[0].mlp.register_forward_hook(double_output)


def doubled_fc(model, undo):
    model.transformer.h[1].mlp.c_fc.register_forward_hook(double_output)


def doubled_gelu(model, undo):
    model.transformer.h[1].mlp.gelu.register_forward_hook(double_output)


def doubled_qkv(model, undo):
    model.transformer.h[1].attn.c_attn.register_forward_hook(double_output)


def doubled_norm(model, undo):
    model.transformer.h[0].ln_1.register_forward_hook(double_output)


def doubled_second_norm(model, undo):
    model.transformer.h[0].ln_2.register_forward_hook(double_output)


def doubled_dropout(model, undo):
    model.transformer.h[0].attn.resid_dropout.register_forward_hook(double_output)


def doubled_final_norm(model, undo):
    model.transformer.ln_f.register_forward_hook(double_output)


def doubled_logits(model, undo):
    model.lm_head.register_forward_hook(double_output)


def doubled_token_embedding(model, undo):
    model.transformer.wte.register_forward_hook(double_output)


def doubled_positions(model, undo):
    model.transformer.wpe.register_forward_hook(double_output)


def halved_block_input(model, undo):
    model.transformer.h[1].register_forward_pre_hook(halve_input)


def halved_attention_input(model, undo):
    model.transformer.h[0].attn.register_forward_pre_hook(halve_input)


def noisy_embeddings(model, undo):
    model.transformer.drop.register_forward_hook(noise)


def steered_block(model, undo):
    model.transformer.h[0].register_forward_hook(steer)


def steered_norm(model, undo):
    model.transformer.h[1].ln_2.register_forward_hook(steer)


def steered_embedding(model, undo):
    model.transformer.wte.register_forward_hook(steer)


def recorded_activations(model, undo):
    """What a probe sees; test_changes.py compares what was recorded."""
    model.recorded = []
    for module in (model.transformer.h[0].mlp.gelu, model.transformer.h[1].attn.c_attn):
        module.register_forward_hook(lambda m, i, y: model.recorded.append(y.detach().mean()))


def recorded_logits(model, undo):
    model.recorded = []
    model.register_forward_hook(
        lambda m, i, y: model.recorded.append(i[0].float().mean()) or None, always_call=True
    )


def hook_with_keywords(model, undo):
    model.transformer.h[0].register_forward_pre_hook(
        lambda m, args, kwargs: ((args[0] / 2,), kwargs), with_kwargs=True
    )


def halved_gradient_of_a_block(model, undo):
    model.transformer.h[1].register_full_backward_hook(halve_gradient)


def halved_gradient_of_a_linear(model, undo):
    model.transformer.h[0].mlp.c_fc.register_full_backward_hook(halve_gradient)


def halved_gradient_of_the_norm(model, undo):
    model.transformer.ln_f.register_full_backward_hook(halve_gradient)


def halved_gradient_of_the_head(model, undo):
    model.lm_head.register_full_backward_pre_hook(halve_incoming)


def halved_incoming_gradient(model, undo):
    model.transformer.h[0].attn.register_full_backward_pre_hook(halve_incoming)


def every_gelu_doubled(model, undo):
    def double(module, inputs, output):
        return 2 * output if isinstance(module, torch.nn.GELU) else None

    undo.enter_context(global_hooks.register_module_forward_hook(double))


def every_norms_input_bounded(model, undo):
    def bound(module, inputs):
        return (inputs[0].tanh(),) if type(module).__name__ == "LayerNorm" else None

    undo.enter_context(global_hooks.register_module_forward_pre_hook(bound))


def every_linears_gradient_halved(model, undo):
    def halve(module, grad_inputs, grad_outputs):
        if isinstance(module, torch.nn.Linear):
            return halve_gradient(module, grad_inputs, grad_outputs)

    undo.enter_context(global_hooks.register_module_full_backward_hook(halve))


def every_incoming_gradient_halved(model, undo):
    def halve(module, grad_outputs):
        return halve_incoming(module, grad_outputs) if isinstance(module, torch.nn.GELU) else None

    undo.enter_context(global_hooks.register_module_full_backward_pre_hook(halve))


def parameters_gradient_halved(model, undo):
    model.transformer.h[0].mlp.c_fc.weight.register_hook(lambda g: g / 2)
    model.transformer.h[1].ln_1.bias.register_hook(lambda g: g / 2)


def tied_weights_gradient_halved(model, undo):
    model.lm_head.weight.register_hook(lambda g: g / 2)


def gradient_changed_where_it_is_kept(model, undo):
    def halve(p):
        p.grad /= 2

    model.transformer.wpe.weight.register_post_accumulate_grad_hook(halve)


def rounded_saved_tensors(model, undo):
    """As for activations kept in fewer bits."""

    def rounded(t):
        return t.half().to(t.dtype) if t.is_floating_point() else t

    undo.enter_context(saved_tensors_hooks(rounded, lambda t: t))


def saved_on_the_cpu(model, undo):
    undo.enter_context(torch.autograd.graph.save_on_cpu())


CHANGES = (
    doubled_mlp, doubled_fc, doubled_gelu, doubled_qkv, doubled_norm, doubled_second_norm,
    doubled_dropout, doubled_final_norm, doubled_logits, doubled_token_embedding,
    doubled_positions, halved_block_input, halved_attention_input, noisy_embeddings, steered_block,
    steered_norm, steered_embedding, recorded_activations, recorded_logits, hook_with_keywords,
    halved_gradient_of_a_block, halved_gradient_of_a_linear, halved_gradient_of_the_norm,
    halved_gradient_of_the_head, halved_incoming_gradient, every_gelu_doubled,
    every_norms_input_bounded, every_linears_gradient_halved, every_incoming_gradient_halved,
    parameters_gradient_halved, tied_weights_gradient_halved, gradient_changed_where_it_is_kept,
    rounded_saved_tensors, saved_on_the_cpu,
)  # fmt: skip
