"""Prepared TFDS folders, written as TFDS lays them out."""

import io
import json

import numpy as np
from PIL import Image

SHAPE = (5, 4, 3)


def write_set(
    folder,
    splits,
    shape=SHAPE,
    stored_shape=None,
    label=True,
    file_format="array_record",
    image_format="PNG",
    images=None,
):
    """Writes `folder` as TFDS lays a prepared set out; returns the pixels and labels by split.

    `images`, by split, stand for random ones of one `shape`; `stored_shape` is what the set says of itself, -1 for any.
    """
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    contents, infos = {}, []
    for split, count in splits.items():
        pixels = rng.integers(0, 256, size=(count, *shape), dtype=np.uint8) if images is None else images[split]
        labels = rng.integers(0, 3, size=count)
        writer = ArrayRecordWriter(
            str(folder / f"tiny-{split}.array_record-00000-of-00001"), "group_size:1,uncompressed"
        )
        for image, number in zip(pixels, labels, strict=True):
            buffer = io.BytesIO()
            Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(buffer, image_format)
            example = tf_example_pb2.Example()
            example.features.feature["image"].bytes_list.value.append(buffer.getvalue())
            if label:
                example.features.feature["label"].int64_list.value.append(int(number))
            writer.write(example.SerializeToString())
        writer.close()
        contents[split] = (pixels, labels)
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        infos.append({"filepathTemplate": template, "name": split, "numBytes": "1", "shardLengths": [str(count)]})
    base = "tensorflow_datasets.core.features"
    dimensions = [str(size) for size in (stored_shape or shape)]
    features = {
        "image": {
            "pythonClassName": f"{base}.image_feature.Image",
            "image": {"dtype": "uint8", "shape": {"dimensions": dimensions}},
        }
    }
    if label:
        features["label"] = {
            "pythonClassName": f"{base}.class_label_feature.ClassLabel",
            "classLabel": {"numClasses": "3"},
        }
    top = {"pythonClassName": f"{base}.features_dict.FeaturesDict", "featuresDict": {"features": features}}
    (folder / "features.json").write_text(json.dumps(top))
    info = {"fileFormat": file_format, "name": "tiny", "version": folder.name, "splits": infos}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return contents
