"""S5 on CIFAR-10, pixel by pixel (1,024 steps), in the authors' setting (Smith et al. 2023, arXiv 2208.04933), CR 3-8.

Six bidirectional layers of 512, state 384 in 3 blocks, 250 epochs of batches of 50. The pixels are in colour; the
authors' Long Range Arena task is grey. They normalise batches, we layers. A is held at 16 bits.
Command: qtrain train --config configs/sequential_cifar10_s5_cpt.py --workdir runs/s5 --config.data.dir=FOLDER
Made for GPUs; hardware, time and expected accuracy: not measured.
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("sequential_cifar10_s5")
    config.quant.recipe = "cpt"
    config.schedule.update(name="cyclic", profile="cosine", low=3, high=8, cycles=8, pattern="repeated")
    config.schedule.grads.update(name="constant", bits=8)
    return finish(config, argument)
