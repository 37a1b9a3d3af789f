"""Prepared TFDS folders, written as TFDS lays them out."""

import io
import json

import numpy as np
from PIL import Image

SHAPE = (5, 4, 3)
_FEATURES = "tensorflow_datasets.core.features"


def write_set(
    folder,
    splits,
    shape=SHAPE,
    stored_shape=None,
    label=True,
    file_format="array_record",
    image_format="PNG",
    images=None,
    unlabelled=(),
):
    """Writes `folder` as TFDS lays a prepared set out; returns the pixels and labels by split.

    `images`, by split, stand for random ones of one `shape`; `stored_shape` is what the set says of itself, -1 for any;
    splits that are `unlabelled` have -1 for every label.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    contents, examples = {}, {}
    for split, count in splits.items():
        pixels = rng.integers(0, 256, size=(count, *shape), dtype=np.uint8) if images is None else images[split]
        labels = np.full(count, -1) if split in unlabelled else rng.integers(0, 3, size=count)
        examples[split] = []
        for image, number in zip(pixels, labels, strict=True):
            buffer = io.BytesIO()
            Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(buffer, image_format)
            examples[split].append({"image": buffer.getvalue()} | ({"label": int(number)} if label else {}))
        contents[split] = (pixels, labels)
    dimensions = [str(size) for size in (stored_shape or shape)]
    features = {
        "image": {
            "pythonClassName": f"{_FEATURES}.image_feature.Image",
            "image": {"dtype": "uint8", "shape": {"dimensions": dimensions}},
        }
    }
    if label:
        features["label"] = {
            "pythonClassName": f"{_FEATURES}.class_label_feature.ClassLabel",
            "classLabel": {"numClasses": "3"},
        }
    _write(folder, examples, features, file_format)
    return contents


def write_text_set(folder, splits):
    """The same for a set of texts: `splits` has the bytes of each example."""
    folder.mkdir(parents=True)
    examples = {split: [{"text": text} for text in texts] for split, texts in splits.items()}
    _write(folder, examples, {"text": {"pythonClassName": f"{_FEATURES}.text_feature.Text", "text": {}}})


def _write(folder, examples, features, file_format="array_record"):
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    infos = []
    for split, rows in examples.items():
        path = folder / f"tiny-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        for row in rows:
            example = tf_example_pb2.Example()
            for name, value in row.items():
                feature = example.features.feature[name]
                (feature.int64_list if isinstance(value, int) else feature.bytes_list).value.append(value)
            writer.write(example.SerializeToString())
        writer.close()
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        infos.append({"filepathTemplate": template, "name": split, "numBytes": "1", "shardLengths": [str(len(rows))]})
    top = {"pythonClassName": f"{_FEATURES}.features_dict.FeaturesDict", "featuresDict": {"features": features}}
    (folder / "features.json").write_text(json.dumps(top))
    info = {"fileFormat": file_format, "name": "tiny", "version": folder.name, "splits": infos}
    (folder / "dataset_info.json").write_text(json.dumps(info))
