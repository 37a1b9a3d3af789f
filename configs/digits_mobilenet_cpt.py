"""A small MobileNetV2 on the digits under cyclic precision training, CR 3-8 bits, gradients 8.

Inverted residuals of depthwise convolutions, width 0.25, three stages. The depthwise kernels, one per channel, are
quantized like the others. What the residual sums keep is a knob of its own, float unless a rule says otherwise:
--config.quant.rules='({"path": ".*/residual", "ops": ("output",), "acts": 8, "act_quantizer": "affine/tensor"},)'
Command: qtrain train --config configs/digits_mobilenet_cpt.py --workdir runs/mobilenet
Expected test accuracy: 96.7 % (seed 0), in float 95.8; 3 minutes on one busy CPU core.
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("digits_mobilenet")
    config.quant.recipe = "cpt"
    config.schedule.update(name="cyclic", profile="cosine", low=3, high=8, cycles=8, pattern="repeated")
    config.schedule.grads.update(name="constant", bits=8)
    return finish(config, argument)
