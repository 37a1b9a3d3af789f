"""A prepared TFDS folder of images with boxes, laid out as that of VOC 2007."""

import io
import json

import numpy as np
from PIL import Image


def write_boxes(folder, splits, num_classes=20, fields=("bbox", "label", "is_difficult")):
    """Writes `folder`; `splits`: by name a list of (pixels, [(y0, x0, y1, x1) as shares, label, is_difficult])."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    folder.mkdir(parents=True)
    infos = []
    for split, examples in splits.items():
        path = folder / f"voc-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        for pixels, objects in examples:
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            example = tf_example_pb2.Example()
            example.features.feature["image"].bytes_list.value.append(buffer.getvalue())
            numbers = example.features.feature
            numbers["objects/bbox"].float_list.value.extend(float(edge) for box, *_ in objects for edge in box)
            numbers["objects/label"].int64_list.value.extend(label for _, label, _ in objects)
            numbers["objects/is_difficult"].int64_list.value.extend(int(difficult) for *_, difficult in objects)
            writer.write(example.SerializeToString())
        writer.close()
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        shards = [str(len(examples))]
        infos.append({"filepathTemplate": template, "name": split, "numBytes": "1", "shardLengths": shards})
    every = {
        "bbox": tfds.features.BBoxFeature(),
        "label": tfds.features.ClassLabel(num_classes=num_classes),
        "is_difficult": np.bool_,
    }
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "objects": tfds.features.Sequence({name: every[name] for name in fields}),
        }
    )
    (folder / "features.json").write_text(json.dumps(features.to_json()))
    info = {"fileFormat": "array_record", "name": "voc", "version": folder.name, "splits": infos}
    (folder / "dataset_info.json").write_text(json.dumps(info))
