"""Mean average precision: cases by hand, a slow reference written from COCO's definition, and COCO's own program."""

import contextlib
import io

import numpy as np
import pytest

from qtrain.tasks.average_precision import RECALLS, THRESHOLDS, mean_average_precision

ROOM = 6


def overlap(first, second):
    tall = min(first[2], second[2]) - max(first[0], second[0])
    wide = min(first[3], second[3]) - max(first[1], second[1])
    inside = max(tall, 0.0) * max(wide, 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return inside / (sum(areas) - inside) if inside else 0.0


def reference(images):
    """``(map, map50)`` of images as (detections of (box, score, class), truths of (box, class, ignored)), in loops."""
    labels = {label for _, truths in images for _, label, ignored in truths if not ignored}
    found = np.full((len(THRESHOLDS), 1 + max(labels, default=-1)), np.nan)
    for label in labels:
        for row, threshold in enumerate(THRESHOLDS):
            ranked, asked = [], 0
            for detections, truths in images:
                own = [(box, ignored) for box, other, ignored in truths if other == label]
                asked += sum(not ignored for _, ignored in own)
                taken = set()
                mine = sorted((d for d in detections if d[2] == label), key=lambda d: -d[1])[:100]
                for box, score, _ in mine:
                    best = None
                    for wanted in (False, True):  # an ignored box only where there is no other
                        for index, (truth, ignored) in enumerate(own):
                            if ignored != wanted or index in taken or overlap(box, truth) < threshold - 1e-10:
                                continue
                            if best is None or overlap(box, truth) >= overlap(box, own[best][0]):
                                best = index
                        if best is not None:
                            break
                    if best is not None:
                        taken.add(best)
                    if best is None or not own[best][1]:
                        ranked.append((score, best is not None))
            ranked.sort(key=lambda pair: -pair[0])
            points, right = [], 0
            for count, (_, hit) in enumerate(ranked, 1):
                right += hit
                points.append((right / asked, right / count))
            reached = [max((p for r, p in points if r >= recall), default=0.0) for recall in RECALLS]
            found[row, label] = np.mean(reached)
    if not labels:
        return float("nan"), float("nan")
    return np.nanmean(found), np.nanmean(found[0])


def arrays(images):
    """The arrays that `mean_average_precision` takes, padded."""
    room = [max([1, *(len(image[side]) for image in images)]) for side in (0, 1)]
    boxes, true_boxes = (np.zeros((len(images), size, 4), np.float32) for size in room)
    classes, true_classes = (np.full((len(images), size), -1) for size in room)
    scores, ignored = np.zeros((len(images), room[0]), np.float32), np.zeros((len(images), room[1]), bool)
    for row, (detections, truths) in enumerate(images):
        for column, values in enumerate(detections):
            boxes[row, column], scores[row, column], classes[row, column] = values
        for column, values in enumerate(truths):
            true_boxes[row, column], true_classes[row, column], ignored[row, column] = values
    return boxes, scores, classes, true_boxes, true_classes, ignored


def random_images(seed, count=12, ignored=0.2, equal_scores=False):
    """Boxes that are moved, missed, doubled, of another class; whole numbers, so that overlaps are often equal."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        truths, detections = [], []
        for _ in range(rng.integers(0, 5)):
            near, sides = rng.integers(0, 30, 2), rng.integers(4, 20, 2)
            truths.append((np.concatenate([near, near + sides]).astype(float), rng.integers(3), rng.random() < ignored))
        for box, label, _ in truths:
            for _ in range(rng.integers(0, 4)):
                moved = box + rng.integers(-2, 3, 4)
                other = label if rng.random() < 0.8 else rng.integers(4)
                detections.append((moved, np.float32(rng.integers(1, 4) / 4 if equal_scores else rng.random()), other))
        if rng.random() < 0.5:
            detections.append((np.array([40.0, 40, 50, 50]), np.float32(rng.random()), rng.integers(4)))
        images.append((detections, truths))
    return images


BOX, FAR = (0.0, 0.0, 10.0, 10.0), (20.0, 20.0, 30.0, 30.0)
SHIFTED = (0.0, 0.0, 10.0, 8.0)  # overlaps BOX by 0.8: right at 0.5 … 0.8, seven of ten thresholds
CASES = {
    "perfect": ([([(BOX, 0.9, 0), (FAR, 0.8, 1)], [(BOX, 0, False), (FAR, 1, False)])], 1.0, 1.0),
    "nothing found": ([([], [(BOX, 0, False)])], 0.0, 0.0),
    "no boxes": ([([(BOX, 0.9, 0)], [])], float("nan"), float("nan")),
    "only ignored boxes": ([([(BOX, 0.9, 0)], [(BOX, 0, True)])], float("nan"), float("nan")),
    "a little off": ([([(SHIFTED, 0.9, 0)], [(BOX, 0, False)])], 0.7, 1.0),
    "another class": ([([(BOX, 0.9, 1)], [(BOX, 0, False)])], 0.0, 0.0),
    "the class is not asked for": ([([(BOX, 0.9, 0), (FAR, 0.8, 3)], [(BOX, 0, False)])], 1.0, 1.0),
    # The second of two on one box is wrong, but after the box is found: precision at recall 1 is that of the first.
    "twice, nothing missed": ([([(BOX, 0.9, 0), (BOX, 0.8, 0)], [(BOX, 0, False)])], 1.0, 1.0),
    # Recall ½ at precision 1, recall 1 at 2/3: 51 and 50 of 101 points.
    "twice before another": (
        [([(BOX, 0.9, 0), (BOX, 0.8, 0), (FAR, 0.7, 0)], [(BOX, 0, False), (FAR, 0, False)])],
        (51 + 50 * 2 / 3) / 101,
        (51 + 50 * 2 / 3) / 101,
    ),
    # What lies on an ignored box does not count, whether it comes before or after.
    "on an ignored box": ([([(FAR, 0.9, 0), (BOX, 0.8, 0)], [(BOX, 0, False), (FAR, 0, True)])], 1.0, 1.0),
    "wrong before right": ([([(FAR, 0.9, 0), (BOX, 0.8, 0)], [(BOX, 0, False)])], 0.5, 0.5),
    "half of two images": ([([(BOX, 0.9, 0)], [(BOX, 0, False)]), ([], [(BOX, 0, False)])], 51 / 101, 51 / 101),
}


@pytest.mark.parametrize("name", CASES)
def test_by_hand(name):
    images, whole, half = CASES[name]
    found = mean_average_precision(*arrays(images))
    assert found.map == pytest.approx(whole, nan_ok=True) and found.map50 == pytest.approx(half, nan_ok=True)
    assert reference(images) == pytest.approx((whole, half), nan_ok=True)


@pytest.mark.parametrize("equal_scores", [False, True])
def test_against_the_reference(equal_scores):
    for seed in range(8):
        images = random_images(seed, equal_scores=equal_scores)
        found = mean_average_precision(*arrays(images))
        assert (found.map, found.map50) == pytest.approx(reference(images), abs=1e-12), seed
        assert 0 < found.map < 1


def test_at_most_a_hundred_detections_of_a_class_count():
    many = [(FAR, 0.9 - 1e-4 * k, 0) for k in range(100)]
    images = [([*many, (BOX, 0.1, 0)], [(BOX, 0, False)])]
    assert mean_average_precision(*arrays(images)).map == 0.0
    assert mean_average_precision(*arrays([(images[0][0][1:], images[0][1])])).map == pytest.approx(0.01)


def test_against_cocos_program():
    coco = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    for seed in range(4):
        images = random_images(seed, count=30, ignored=0.0)
        truths = [
            {"id": 0, "image_id": row, "category_id": int(label), "bbox": xywh(box), "iscrowd": 0, "area": area(box)}
            for row, (_, those) in enumerate(images)
            for box, label, _ in those
        ]
        truths = [{**truth, "id": number + 1} for number, truth in enumerate(truths)]
        results = [
            {"image_id": row, "category_id": int(label), "bbox": xywh(box), "score": float(score)}
            for row, (these, _) in enumerate(images)
            for box, score, label in these
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            there = coco.COCO()
            there.dataset = {
                "info": {},
                "images": [{"id": row} for row in range(len(images))],
                "categories": [{"id": label} for label in range(4)],
                "annotations": truths,
            }
            there.createIndex()
            evaluation = cocoeval.COCOeval(there, there.loadRes(results), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        found = mean_average_precision(*arrays(images))
        assert (found.map, found.map50) == pytest.approx(tuple(evaluation.stats[:2]), abs=1e-12), seed


def xywh(box):
    return [float(box[1]), float(box[0]), float(box[3] - box[1]), float(box[2] - box[0])]


def area(box):
    return float((box[2] - box[0]) * (box[3] - box[1]))
