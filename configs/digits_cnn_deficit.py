"""A quantization deficit early in training (Wolfe & Kyrillidis 2024, arXiv 2403.02243, critical learning periods).

Forward at 3 bits for the first quarter of the run, then at 8; the backward pass always at 8. Moving the window with
--config.schedule.start_percent gives the sliding-window experiment.
Command: qtrain train --config configs/digits_cnn_deficit.py --workdir runs/deficit
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("digits_cnn")
    config.schedule.update(name="window", low=3, high=8, start_percent=0.0, length_percent=25.0)
    config.schedule.grads.update(name="constant", bits=8)
    return finish(config, argument)
