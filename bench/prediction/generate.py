"""Inductor's code of nanoGPT's compiled step, forward.py and backward.py, in a folder.

    python -m bench.prediction.generate FOLDER SIZE B

For inductor.py, which runs it in a process that has a driver (no_gpu.py).
"""

import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.peers import models
from bench.prediction import no_gpu


def main(folder: Path, size: str, B: int) -> None:
    no_gpu.pretend_to_inductor()
    codes: list[str] = []
    backend = no_gpu.inductor(lambda graph, code: codes.append(code))
    module, config = models.load_nanogpt(), models.config_of(size)
    sizes = {name: getattr(config, name) for name in module.GPTConfig.__dataclass_fields__}
    with models.quietly(), torch.device("meta"):
        model = module.GPT(module.GPTConfig(**sizes))
    with FakeTensorMode(allow_non_fake_inputs=True):
        compiled = torch.compile(no_gpu.on_cuda(model), fullgraph=True, backend=backend)
        idx = torch.empty(B, config.block_size, device="cuda", dtype=torch.int64)
        with torch.autocast("cuda", torch.bfloat16):
            loss = compiled(idx, idx)[1]
        loss.backward()
    for name, code in zip(("forward", "backward"), codes, strict=True):
        (folder / f"{name}.py").write_text(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
