"""A byte-level LSTM on the reference text of Python itself under cyclic precision training, CR 3-8, gradients 8.

One layer of 256; the text, about 700 kB, comes with Python and depends on its version.
Command: qtrain train --config configs/python_reference_lstm_cpt.py --workdir runs/lstm
Expected test loss: 1.44 nats a byte (seed 0), in float 1.41; 7 minutes on one busy CPU core.
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("python_reference_lstm")
    config.schedule.update(name="cyclic", profile="cosine", low=3, high=8, cycles=8, pattern="repeated")
    config.schedule.grads.update(name="constant", bits=8)
    return finish(config, argument)
