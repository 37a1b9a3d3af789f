"""A graph convolutional network on OGBN-Arxiv, the setting of Wolfe & Kyrillidis (2024, arXiv 2403.02243).

Three layers of 512, layer norms, dropout 0.2, Adam from 1e-3 to a tenth of it along a cosine, 500 full-batch steps.
CR: 3 to 8 bits, 8 cycles, gradients 8; sums over neighbours in float. Reads the set with the extra `ogb`.
Command: qtrain train --config configs/ogbn_arxiv_gcn_cpt.py --workdir runs/arxiv --config.data.path=FOLDER
Made for GPUs; hardware, time and expected accuracy: not measured.
"""

from qtrain.config import base_config, finish


def get_config(argument: str = ""):
    config = base_config("ogbn_arxiv_gcn")
    config.quant.recipe = "cpt"
    config.schedule.update(name="cyclic", profile="cosine", low=3, high=8, cycles=8, pattern="repeated")
    config.schedule.grads.update(name="constant", bits=8)
    return finish(config, argument)
