"""RetinaNet with a ResNet-18 on PASCAL VOC 2007 under cyclic precision training (arXiv 2403.02243).

Trained on the splits train and validation (5,011 images), tested on test; images are resized to 512x512, objects
marked as difficult are ignored. CR with the cycles of the paper, 8, and 2 for fine-tuning: set schedule.cycles=2 with
init_from=RUN, a float run of this config. The quantizers are the authors'; as in their ImageNet networks bits go from
4 to 8, and the stem, the shortcuts and the last layers, here of both subnets, are float. The optimizer is RetinaNet's
(Lin et al. 2017, arXiv 1708.02002, section 4.1: SGD at 0.01, divided by 10 at 2/3 and 8/9, batch 16) over 72 epochs:
what the paper took for its detector is not known to us. From random parameters it will fall short of networks that
were trained on ImageNet first.
Made for a GPU; time: not measured. Expected: not measured.
Command: qtrain train --config configs/voc_detect_cpt.py --workdir runs/voc --config.data.dir=FOLDER
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("voc_detect")
    config.quant.recipe = "cpt"
    in_float = {"weight_quantizer": "none", "act_quantizer": "none"}
    config.quant.rules = (
        {"path": "backbone/stem|.*/shortcut", **in_float},
        {"path": "class_subnet/logits|box_subnet/deltas", **in_float},
    )
    config.schedule.update(name="cyclic", profile="cosine", low=4, high=8, cycles=8, pattern="repeated")
    config.schedule.grads.update(name="constant", bits=8)
    return finish(config, argument)
