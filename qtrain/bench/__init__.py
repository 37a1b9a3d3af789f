"""``qtrain bench``: what a quantized train step costs beside the float32 one, AQT's and Qwix's, measured in turn.

The names are here, so that a wrong one is refused before anything heavy is imported.
"""

SUITES = ("matmul", "block", "resnet", "lm", "schedule")

BASELINE = "float32"
ARMS = (BASELINE, "bfloat16", "qtrain_fake", "qtrain_native", "aqt_qat", "aqt_int8", "qwix_qat", "qwix_int8")
REFERENCE = "float32_materialised"
"""A second float32 baseline, of suite ``resnet`` alone: see `qtrain.bench.arms.materialised`."""
