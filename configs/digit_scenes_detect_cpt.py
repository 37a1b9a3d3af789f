"""A small RetinaNet on scenes of handwritten digits under cyclic precision training (arXiv 2403.02243).

1 to 5 real digits at 8 to 24 pixels on 64x64, training scenes of training digits, test scenes of test digits. CR:
weights and activations follow a cosine from 3 to 8 bits, 8 times; gradients 8 bits, stochastic. The first layer and the
last of each subnet stay at 8 bits.
Time: 580 s on part of one busy CPU core. Expected mAP@.5: 0.84 (seed 0), in float 0.93, at 8 bits throughout 0.92.
Command: qtrain train --config configs/digit_scenes_detect_cpt.py --workdir runs/digit_scenes
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("digit_scenes_detect")
    # The last layers are two, one for each subnet, of which the recipe knows the very last alone.
    config.quant.rules = (
        {
            "path": "class_subnet/logits",
            "weights": 8,
            "acts": 8,
            "grad_quantizer": "symmetric/tensor/stochastic",
        },
    )
    config.schedule.update(name="cyclic", profile="cosine", low=3, high=8, cycles=8, pattern="repeated")
    config.schedule.grads.update(name="constant", bits=8)
    return finish(config, argument)
