"""Weights in and out: names that wrappers prefix, and Hugging Face's layout of the same weights."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.storage.printable import first_line

SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 350M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}

_WRAPPERS = ("_orig_mod", "module")  # what torch.compile and DDP put into names
_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_MASKS = (
    ".attn.bias",
    ".attn.masked_bias",
)  # causal masks, buffers in some versions, never weights


def accept_wrapped_names(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    """A load_state_dict pre-hook: names match whatever torch.compile or DDP wrapped, then or now.

    A name that is the module's own as it is, or behind wrappers of the whole, stays: a fork's own
    wrapper may call what it wraps `module`, and have a weight of its own beside. The dict is
    load_state_dict's own shallow copy; the caller's stays as it is.
    """
    pairs = [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]
    own = {name for name, _ in pairs}
    entries = {name: state_dict.pop(name) for name in list(state_dict) if name.startswith(prefix)}
    targets = {name: _inside(name[len(prefix) :], own) for name in entries}
    free = {_bare(name): name for name in own.difference(targets.values())}
    for name, value in entries.items():
        bare = _bare(name[len(prefix) :])
        target = targets[name] or free.get(bare)
        if target or not name.endswith(_MASKS):
            state_dict[prefix + (target or bare)] = value


def _inside(name: str, own: set[str]) -> str | None:
    """The name without the wrappers that it begins with, where it is one of `own`."""
    while name not in own:
        wrapper, _, name = name.partition(".")
        if wrapper not in _WRAPPERS:
            return None
    return name


def bare_name(name: str) -> str | None:
    """A weight's name without wrappers'; None for a causal mask, which is no weight."""
    return None if name.endswith(_MASKS) else _bare(name)


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def from_hugging_face(
    model_class: Any, config_class: Any, model_type: str, override_args: dict[str, Any]
) -> Any:
    """A `model_class` with the weights that transformers has as `model_type`, or a folder has."""
    if model_type not in SIZES and not Path(model_type).is_dir():
        raise ValueError(
            f"unknown model_type={model_type!r}; use one of {', '.join(SIZES)}, or a local folder"
        )
    allowed = {"dropout", "gelu", "return_logits", "checkpoint_blocks"}
    if not set(override_args) <= allowed:
        wrong = ", ".join(sorted(set(override_args) - allowed))
        raise ValueError(f"cannot override {wrong}: {model_type} fixes it; only {sorted(allowed)}")
    transformers = import_transformers()
    print(f"loading weights from pretrained gpt: {model_type}")
    if not Path(model_type).is_dir():
        hf_model = transformers.GPT2LMHeadModel.from_pretrained(model_type)
        sizes = dict(SIZES[model_type], vocab_size=50257, block_size=1024, bias=True)
    else:
        hf_model = load_folder(Path(model_type))
        sizes = sizes_of(hf_model.config) | {"dropout": 0.0}
    model = model_class(config_class(**{**sizes, **override_args}))
    load_hugging_face(model, hf_model.state_dict())
    return model


def import_transformers() -> Any:
    """Large, and only needed to exchange weights."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"Hugging Face's weights need transformers ({error}); pip install 'fastgpt[hf]'"
        ) from None
    return transformers


def load_folder(folder: Path) -> Any:
    """transformers' GPT2LMHeadModel of a local folder: nothing is fetched, no code in it is run."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json, so it holds no Hugging Face model; "
            f"name a checkpoint by its file, as in {folder / 'ckpt.pt'}"
        )
    try:
        values = json.loads(path.read_bytes())
        hf_config = import_transformers().GPT2Config(**_plain(values))
        sizes_of(hf_config)
        _check_stored(hf_config, folder)
    except ImportError:
        raise
    except Exception as error:  # a malformed one raises anything
        raise ValueError(f"{path} is no GPT-2's: {error}") from None
    # attention of a name that the folder chooses might be fetched from anywhere
    how = dict(attn_implementation="eager", trust_remote_code=False, local_files_only=True)
    try:
        with _quiet(import_transformers()):
            model, loading_info = import_transformers().GPT2LMHeadModel.from_pretrained(
                str(folder), config=hf_config, output_loading_info=True, **how
            )
    except Exception as error:
        reason = first_line(error)
        if "weights_only" in reason:  # whose advice is to run what is in the file
            reason = "its weights are no tensors alone, and were not loaded"
        raise ValueError(f"{folder} holds no GPT-2 that can be loaded: {reason:.300}") from None
    for kind in ("missing", "unexpected", "mismatched"):  # drawn anew, dropped: never silently
        names = [str(name) for name in loading_info[f"{kind}_keys"]]
        if wrong := sorted(name for name in names if not name.endswith(_MASKS)):
            raise ValueError(f"{folder} holds no GPT-2 of its config.json: {kind} {wrong[0]}")
    return model


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """transformers without its bars and tables: the caller reports in one line what they show."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


_ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
# what nanoGPT's GPT has built in, and transformers' can be configured to do otherwise
_FIXED = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}
_READ = (
    *("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"),
    *("activation_function", "resid_pdrop", "bos_token_id", "eos_token_id", *_FIXED),
)


def _plain(values: Any) -> dict[str, Any]:
    """Of a config.json what a GPT-2 is made by: the rest may name code, kernels, quantizers."""
    if not isinstance(values, dict) or values.get("model_type") != "gpt2":
        model_type = values.get("model_type") if isinstance(values, dict) else values
        raise ValueError(f"cannot convert model_type={model_type!r:.60}, only 'gpt2'")
    return {name: values[name] for name in _READ if name in values}


def sizes_of(hf: Any) -> dict[str, Any]:
    """The fields of a GPTConfig. ValueError names what a GPT of nanoGPT's cannot do."""
    for name, value in _FIXED.items():
        if getattr(hf, name) != value:
            raise ValueError(f"cannot convert {name}={getattr(hf, name)!r:.60}, only {value!r}")
    if hf.activation_function not in _ACTIVATIONS:
        raise ValueError(f"cannot convert activation_function={hf.activation_function!r}, no GELU")
    sizes = dict(
        block_size=hf.n_positions,
        vocab_size=hf.vocab_size,
        n_layer=hf.n_layer,
        n_head=hf.n_head,
        n_embd=hf.n_embd,
    )
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r:.60} must be an integer of at least 1")
    if not isinstance(hf.resid_pdrop, (int, float)) or not 0 <= hf.resid_pdrop < 1:
        raise ValueError(f"resid_pdrop={hf.resid_pdrop!r:.60} must be at least 0 and below 1")
    if hf.n_inner not in (None, 4 * hf.n_embd):
        raise ValueError(f"cannot convert n_inner={hf.n_inner}, only 4 * n_embd={4 * hf.n_embd}")
    gelu = _ACTIVATIONS[hf.activation_function]
    return dict(sizes, bias=True, dropout=hf.resid_pdrop, gelu=gelu)


def count_parameters(n_layer: int, n_embd: int, vocab_size: int, block_size: int) -> int:
    """Numbers in a GPT's weights, without biases; the head's are the token embedding's."""
    matrices, norms = 12 * n_layer * n_embd, 2 * n_layer + 1
    return (matrices + norms + vocab_size + block_size) * n_embd


def _check_stored(hf: Any, folder: Path) -> None:
    """ValueError if the config asks for more weights than the files could hold, before any is made:
    at a byte each at the least.
    """
    wanted = count_parameters(hf.n_layer, hf.n_embd, hf.vocab_size, hf.n_positions)
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
    stored = sum(path.stat().st_size for path in files)
    if wanted > stored:
        raise ValueError(
            f"n_layer={hf.n_layer}, n_embd={hf.n_embd} and vocab_size={hf.vocab_size} make "
            f"{wanted:,} weights, and its files have {stored:,} bytes"
        )


@torch.no_grad()
def load_hugging_face(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy a GPT2LMHeadModel's state dict into a GPT; its Conv1D weights are stored transposed."""
    weights = {name: w for name, w in weights.items() if not name.endswith(_MASKS)}
    parameters = model.state_dict()
    if weights.keys() != parameters.keys():
        raise ValueError(
            f"parameter names differ: {sorted(weights.keys() ^ parameters.keys())[:4]}, ..."
        )
    for name, weight in weights.items():
        weight = weight.t() if name.endswith(_CONV1D) else weight
        if weight.shape != parameters[name].shape:
            shape = tuple(parameters[name].shape)
            raise ValueError(
                f"{name} is {tuple(weight.shape)} in the source and {shape} in this model"
            )
        parameters[name].copy_(weight)


def to_hugging_face(model: nn.Module) -> dict[str, Tensor]:
    """A GPT's weights under the names and in the layout of transformers' GPT2LMHeadModel."""
    return {
        name: w.t().contiguous() if name.endswith(_CONV1D) else w
        for name, w in model.state_dict().items()
    }
