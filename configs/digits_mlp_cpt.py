"""A two-layer perceptron on the handwritten digits under cyclic precision training: the smallest run there is."""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("digits_mlp")
    config.schedule.update(name="cyclic", profile="cosine", low=3, high=8, cycles=8, pattern="repeated")
    config.schedule.grads.update(name="constant", bits=8)
    return finish(config, argument)
