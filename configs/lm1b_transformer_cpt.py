"""A byte-level transformer of GPT-2's small size on the One Billion Word benchmark, CR 4-8 bits, gradients 8.

12 layers of width 768, rotary positions, RMS norms, SwiGLU; windows of 512 bytes. Reads the prepared TFDS set lm1b and
keeps its 4 GB in memory.
Command: qtrain train --config configs/lm1b_transformer_cpt.py --workdir runs/lm1b --config.data.dir=FOLDER
Made for GPUs; hardware, time and expected loss: not measured.
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("lm1b_transformer")
    config.quant.recipe = "cpt"
    config.schedule.update(name="cyclic", profile="cosine", low=4, high=8, cycles=8, pattern="repeated")
    config.schedule.grads.update(name="constant", bits=8)
    return finish(config, argument)
