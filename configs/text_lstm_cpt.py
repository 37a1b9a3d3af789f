"""An LSTM of 800 units on a text of yours, CR 3-8 bits: the language model of Wolfe & Kyrillidis (arXiv 2403.02243).

One layer of 800, windows of 35, batch 20. Theirs predicts the words of the Penn Treebank, which we may not pass on;
this one predicts bytes, of whatever file data.path names. Their optimizer we could not read: Adam here.
Command: qtrain train --config configs/text_lstm_cpt.py --workdir runs/lstm --config.data.path=FILE
Expected: not measured.
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("text_lstm")
    config.schedule.update(name="cyclic", profile="cosine", low=3, high=8, cycles=8, pattern="repeated")
    config.schedule.grads.update(name="constant", bits=8)
    return finish(config, argument)
