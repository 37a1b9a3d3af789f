"""Reference models, in plain Flax linen: they know nothing of quantization.

Every one is called as ``model.apply(variables, x, train=False)``, computes in its `dtype` and keeps its parameters in
float32.
"""

from qtrain.models.build import BOX_MODELS, GRAPH_MODELS, MODELS, build
from qtrain.models.cnn import CNN
from qtrain.models.detector import Detector
from qtrain.models.gcn import GCN
from qtrain.models.graph_sage import GraphSAGE
from qtrain.models.imagenet_resnet import ImageNetResNet
from qtrain.models.lstm import LSTMLM, LSTMClassifier
from qtrain.models.mlp import MLP
from qtrain.models.mobilenet import MobileNetV2
from qtrain.models.residual import Residual
from qtrain.models.resnet import CifarResNet
from qtrain.models.s5 import S5LM, S5Classifier
from qtrain.models.transformer import TransformerLM
from qtrain.models.vit import ViT

__all__ = [
    "BOX_MODELS",
    "CNN",
    "GCN",
    "GRAPH_MODELS",
    "LSTMLM",
    "MLP",
    "MODELS",
    "S5LM",
    "CifarResNet",
    "Detector",
    "GraphSAGE",
    "ImageNetResNet",
    "LSTMClassifier",
    "MobileNetV2",
    "Residual",
    "S5Classifier",
    "TransformerLM",
    "ViT",
    "build",
]
