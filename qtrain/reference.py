"""The reference tasks: data, model and optimizer of each, as a config starts from them."""

from __future__ import annotations

from typing import Any


def _imagenet(model: dict[str, Any]) -> dict[str, Any]:
    """The reference setting of residual networks: 90 epochs at 224x224."""
    return {
        "data": {
            "name": "tfds:imagenet2012",
            "batch_size": 256,
            "num_classes": 1000,
            "image_shape": (224, 224, 3),
            "augment": ("resized_crop", "flip"),
            "central_crop": 0.875,
            "in_memory": False,
            "workers": 16,
            "prefetch": 16,
        },
        "model": model,
        "optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "schedule": "cosine"},
        "train": {"steps": 500_400},
    }


def _cifar(learning_rate: float) -> dict[str, Any]:
    """The optimizer of the CIFAR recipes: a tenth of the rate after half, and a tenth of that after three quarters."""
    return {
        "name": "sgd",
        "learning_rate": learning_rate,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "schedule": "step",
        "boundaries_percent": (50, 75),
    }


def _state_space(learning_rate: float) -> tuple[dict[str, Any], ...]:
    """The parameters of the S5 recurrence, which the authors train at a slower rate, without decay."""
    names = "A/.*|B_real/kernel|B_imag/kernel|discretisation/.*"
    return ({"path": f".*/ssm/({names})", "learning_rate": learning_rate, "weight_decay": 0.0},)


# The poles of the recurrence: below 8 bits a rounded one may be unstable, so they do not follow the schedule.
_STATE_MATRIX = ({"path": ".*/ssm/A/.*", "ops": ("param",), "weights": 16, "weight_quantizer": "affine/tensor"},)

TASKS: dict[str, dict[str, Any]] = {
    "digits_mlp": {
        "data": {"name": "digits", "batch_size": 64},
        "model": {"name": "mlp", "features": (128, 128)},
        "optimizer": {"name": "adam", "learning_rate": 2e-3, "schedule": "cosine"},
        "train": {"steps": 2000},
    },
    "digits_cnn": {
        "data": {"name": "digits", "batch_size": 64, "augment": ("crop",), "crop_padding": 1},
        "model": {"name": "cnn", "features": (32, 64), "hidden": 128},
        "optimizer": {"name": "adam", "learning_rate": 2e-3, "schedule": "cosine"},
        "train": {"steps": 3000},
    },
    "digits_resnet": {
        "data": {"name": "digits", "batch_size": 64, "augment": ("crop",), "crop_padding": 1},
        "model": {"name": "resnet", "depth": 8, "width": 0.5},
        "optimizer": {"name": "adam", "learning_rate": 2e-3, "schedule": "cosine"},
        "train": {"steps": 1500},
    },
    "digits_mobilenet": {
        "data": {"name": "digits", "batch_size": 64, "augment": ("crop",), "crop_padding": 1},
        "model": {"name": "mobilenet", "width": 0.25, "blocks": (1, 2, 2), "last_features": 128, "reduction": 8},
        "optimizer": {"name": "adam", "learning_rate": 2e-3, "schedule": "cosine"},
        "train": {"steps": 1000},
    },
    "digits_vit": {
        "data": {"name": "digits", "batch_size": 64, "augment": ("crop",), "crop_padding": 1},
        "model": {"name": "vit", "patch": 2, "num_layers": 4, "width": 64, "num_heads": 4},
        "quant": {"ops": ("weighted", "attention")},
        "optimizer": {
            "name": "adamw",
            "learning_rate": 1e-3,
            "weight_decay": 0.05,
            "schedule": "cosine",
            "warmup_percent": 5.0,
        },
        "train": {"steps": 1500},
    },
    "mnist_mlp": {
        "data": {"name": "mnist", "batch_size": 128},
        "model": {"name": "mlp", "features": (256, 128)},
        "optimizer": {"name": "adam", "learning_rate": 1e-3, "schedule": "cosine"},
        "train": {"steps": 4680},
    },
    "mnist_cnn": {
        "data": {"name": "mnist", "batch_size": 128},
        "model": {"name": "cnn", "features": (16, 32), "hidden": 128},
        "optimizer": {"name": "adam", "learning_rate": 1e-3, "schedule": "cosine"},
        "train": {"steps": 2340},
    },
    "cifar10_resnet20": {
        "data": {"name": "cifar10", "batch_size": 128, "augment": ("crop", "flip")},
        "model": {"name": "resnet", "depth": 20},
        "optimizer": _cifar(0.1),
        "train": {"steps": 64_000},
    },
    "cifar10_cnn": {
        "data": {"name": "cifar10", "batch_size": 128, "augment": ("crop", "flip")},
        "model": {"name": "cnn", "features": (32, 64, 128), "hidden": 128},
        "optimizer": {"name": "adam", "learning_rate": 1e-3, "schedule": "cosine"},
        "train": {"steps": 15_600},
    },
    "cifar100_mobilenet": {
        "data": {"name": "cifar100", "batch_size": 128, "augment": ("crop", "flip")},
        "model": {"name": "mobilenet", "reduction": 8},
        "optimizer": _cifar(0.03),
        "train": {"steps": 64_000},
    },
    "sequential_digits_s5": {
        "data": {"name": "sequential_digits", "batch_size": 64},
        "model": {
            "name": "s5",
            "num_layers": 2,
            "width": 32,
            "state_size": 32,
            "bidirectional": True,
            "dropout": 0.1,
        },
        "quant": {"rules": _STATE_MATRIX},
        "optimizer": {
            "name": "adamw",
            "learning_rate": 4e-3,
            "weight_decay": 0.05,
            "clip_norm": 1.0,
            "groups": _state_space(1e-3),
        },
        "train": {"steps": 1500},
    },
    "sequential_mnist_s5": {
        "data": {"name": "sequential_mnist", "batch_size": 50},
        "model": {"name": "s5", "num_layers": 4, "width": 96, "state_size": 128, "dropout": 0.1},
        "quant": {"rules": _STATE_MATRIX},
        "optimizer": {
            "name": "adamw",
            "learning_rate": 8e-3,
            "weight_decay": 0.01,
            "groups": _state_space(2e-3),
            "warmup_epochs": 1.0,
        },
        "train": {"epochs": 150.0},
    },
    "sequential_cifar10_s5": {
        "data": {"name": "sequential_cifar10", "batch_size": 50},
        "model": {
            "name": "s5",
            "num_layers": 6,
            "width": 512,
            "state_size": 384,
            "blocks": 3,
            "bidirectional": True,
            "dropout": 0.1,
        },
        "quant": {"rules": _STATE_MATRIX},
        "optimizer": {
            "name": "adamw",
            "learning_rate": 4.5e-3,
            "weight_decay": 0.07,
            "groups": _state_space(1e-3),
            "warmup_epochs": 1.0,
        },
        "train": {"epochs": 250.0},
    },
    "cylinder_bell_funnel_s5": {
        "data": {"name": "cylinder_bell_funnel", "batch_size": 64},
        "model": {"name": "s5", "num_layers": 2, "width": 16, "state_size": 16},
        "quant": {"rules": _STATE_MATRIX},
        "optimizer": {"name": "adamw", "learning_rate": 4e-3, "weight_decay": 0.05, "groups": _state_space(1e-3)},
        "train": {"steps": 500},
    },
    "digit_scenes_detect": {
        "data": {"name": "digit_scenes", "batch_size": 32, "num_train": 8192, "num_test": 256},
        "model": {
            "name": "detector",
            "backbone": "cifar",
            "levels": (2, 3),
            "features": 32,
            "head_depth": 1,
            "anchor_scale": 1.5,
            "octaves": 2,
        },
        "optimizer": {"name": "adam", "learning_rate": 2e-3, "schedule": "cosine", "warmup_percent": 5.0},
        "train": {"steps": 1500},
        "eval": {"batch_size": 64},
    },
    "voc_detect": {
        "data": {
            "name": "voc",
            "batch_size": 16,
            "image_shape": (512, 512, 3),
            "max_boxes": 64,
            "augment": ("flip",),
            "in_memory": False,
            "workers": 8,
            "prefetch": 16,
        },
        "model": {"name": "detector", "backbone": "resnet18"},
        "optimizer": {
            "name": "sgd",
            "learning_rate": 0.01,
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "clip_norm": 10.0,
            "schedule": "step",
            "boundaries_percent": (67, 89),
            "warmup_percent": 2.0,
        },
        "train": {"steps": 22_500},
        "eval": {"batch_size": 16},
    },
    "cora_gcn": {
        "data": {"name": "cora", "batch_size": 1},
        "model": {"name": "gcn", "width": 16, "dropout": 0.5, "input_dropout": 0.5},
        "optimizer": {"name": "adam", "learning_rate": 0.01, "weight_decay": 5e-4, "schedule": "constant"},
        "eval": {"splits": ("validation", "test")},
        "train": {"steps": 200},
    },
    "digits_gcn": {
        "data": {"name": "digits_graph", "batch_size": 1},
        "model": {"name": "gcn", "width": 16, "dropout": 0.5, "input_dropout": 0.5},
        "optimizer": {"name": "adam", "learning_rate": 0.01, "weight_decay": 5e-4, "schedule": "constant"},
        "eval": {"splits": ("validation", "test")},
        "train": {"steps": 200},
    },
    "ogbn_arxiv_gcn": {
        "data": {"name": "ogbn_arxiv", "batch_size": 1},
        "model": {"name": "gcn", "num_layers": 3, "width": 512, "norm": "layer", "dropout": 0.2},
        "optimizer": {"name": "adam", "learning_rate": 1e-3, "schedule": "cosine", "final_factor": 0.1},
        "eval": {"splits": ("validation", "test")},
        "train": {"steps": 500},
    },
    "imagenette_resnet": {
        "data": {
            "name": "imagenette",
            "batch_size": 64,
            "image_shape": (128, 128, 3),
            "augment": ("resized_crop", "flip"),
            "crop_area": 0.35,
            "central_crop": 0.875,
            "in_memory": False,
            "workers": 8,
            "prefetch": 16,
        },
        "model": {"name": "imagenet_resnet", "depth": 18, "width": 0.5, "stem": "3x3"},
        "optimizer": {
            "name": "sgd",
            "learning_rate": 0.05,
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "schedule": "cosine",
            "warmup_percent": 5.0,
        },
        "train": {"steps": 5880},
    },
    **{f"imagenet_resnet{depth}": _imagenet({"name": "imagenet_resnet", "depth": depth}) for depth in (18, 50)},
    "imagenet_vit": {
        "data": {**_imagenet({})["data"], "batch_size": 1024},
        "model": {
            "name": "vit",
            "patch": 16,
            "num_layers": 12,
            "width": 192,
            "num_heads": 3,
            "drop_path": 0.1,
        },
        "quant": {"ops": ("weighted", "attention")},
        "optimizer": {
            "name": "adamw",
            "learning_rate": 1e-3,
            "weight_decay": 0.05,
            "schedule": "cosine",
            "warmup_epochs": 5.0,
        },
        "train": {"epochs": 300.0},
    },
    "python_reference_lstm": {
        "data": {"name": "python_reference", "batch_size": 16, "length": 128},
        "model": {"name": "lstm", "num_layers": 1, "width": 256},
        "quant": {"ops": ("weighted", "embed")},  # so that the embedding is the first layer, not the only cell
        "optimizer": {
            "name": "adam",
            "learning_rate": 4e-3,
            "clip_norm": 1.0,
            "schedule": "cosine",
            "warmup_percent": 5.0,
        },
        "eval": {"splits": ("validation", "test")},
        "train": {"steps": 800},
    },
    "text_lstm": {
        "data": {"name": "text", "batch_size": 20, "length": 35},
        "model": {"name": "lstm", "num_layers": 1, "width": 800, "dropout": 0.5},
        "quant": {"ops": ("weighted", "embed")},  # so that the embedding is the first layer, not the only cell
        "optimizer": {"name": "adam", "learning_rate": 1e-3, "clip_norm": 1.0, "schedule": "cosine"},
        "eval": {"splits": ("validation", "test")},
        "train": {"epochs": 40.0},
    },
    "lm1b_transformer": {
        "data": {"name": "lm1b", "batch_size": 256, "length": 512, "workers": 8, "prefetch": 16},
        "model": {
            "name": "transformer",
            "num_layers": 12,
            "width": 768,
            "num_heads": 12,
            "positions": "rotary",
            "norm": "rms",
            "mlp": "swiglu",
            "use_bias": False,
        },
        "quant": {"ops": ("weighted", "attention")},
        "optimizer": {
            "name": "adamw",
            "learning_rate": 6e-4,
            "weight_decay": 0.1,
            "clip_norm": 1.0,
            "schedule": "cosine",
            "warmup_steps": 2000,
            "final_factor": 0.1,
        },
        "train": {"steps": 100_000},
    },
    "tiny_shakespeare_transformer": {
        "data": {"name": "tiny_shakespeare", "batch_size": 16, "length": 128},
        "model": {"name": "transformer", "num_layers": 4, "width": 128, "num_heads": 4},
        "quant": {"ops": ("weighted", "attention")},
        "optimizer": {
            "name": "adamw",
            "learning_rate": 2e-3,
            "weight_decay": 0.01,
            "clip_norm": 1.0,
            "schedule": "cosine",
            "warmup_percent": 5.0,
        },
        "eval": {"splits": ("validation", "test")},
        "train": {"steps": 1600},
    },
}
"""Data, model and optimizer of each reference task; the method comes on top."""

SMOKE_MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"features": (16, 16)},
    "cnn": {"features": (4, 8), "hidden": 16},
    "resnet": {"depth": 8, "width": 0.25},
    "imagenet_resnet": {"depth": 18, "width": 0.0625},
    "transformer": {"num_layers": 1, "width": 16, "num_heads": 2},
    "mobilenet": {"width": 0.1, "blocks": (1, 1), "last_features": 16},
    "vit": {"num_layers": 1, "width": 16, "num_heads": 2},
    "lstm": {"num_layers": 1, "width": 16},
    "s5": {"num_layers": 1, "width": 16, "state_size": 8, "blocks": 1},
    "detector": {"width": 0.25, "features": 8, "head_depth": 1, "octaves": 1},
    "gcn": {"width": 8},
    "graph_sage": {"width": 8},
}
"""What `:smoke` makes of each model: seconds, not minutes."""
