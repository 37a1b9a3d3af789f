"""S5 on MNIST, pixel by pixel (784 steps), in the authors' setting (Smith et al. 2023, arXiv 2208.04933), CR 3-8 bits.

Four layers of 96, state 128, 150 epochs of batches of 50, AdamW at 8e-3, the recurrence at 2e-3. They normalise
batches, we layers. A is held at 16 bits.
Command: qtrain train --config configs/sequential_mnist_s5_cpt.py --workdir runs/s5 --config.data.dir=FOLDER
Made for GPUs; hardware, time and expected accuracy: not measured; the authors' float model has 99.65 %.
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("sequential_mnist_s5")
    config.quant.recipe = "cpt"
    config.schedule.update(name="cyclic", profile="cosine", low=3, high=8, cycles=8, pattern="repeated")
    config.schedule.grads.update(name="constant", bits=8)
    return finish(config, argument)
