"""Detection as a task: overlaps, offsets, matching, losses and suppression, against numpy; the train step on boxes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtrain.tasks.boxes import decoded, encoded, matched, overlaps
from qtrain.tasks.detection import Detection, focal_loss, smooth_l1
from qtrain.tasks.suppression import detections, kept

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def random_boxes(rng, *shape, size=64, least=3):
    near = rng.uniform(0, size - least, (*shape, 2))
    sides = least + rng.uniform(0, 1, (*shape, 2)) * (size - near - least) * 0.5
    return np.concatenate([near, near + sides], axis=-1).astype(np.float32)


def numpy_overlaps(first, second):
    result = np.zeros((len(first), len(second)))
    for i, a in enumerate(first.astype(np.float64)):
        for j, b in enumerate(second.astype(np.float64)):
            tall, wide = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
            if tall > 0 and wide > 0:
                areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
                result[i, j] = tall * wide / (areas - tall * wide)
    return result


def test_overlaps():
    rng = np.random.default_rng(0)
    first, second = random_boxes(rng, 20), random_boxes(rng, 15)
    second[0], second[1] = first[3], 0  # the same; no area at all
    found = np.asarray(quick_jit(overlaps)(first, second))
    np.testing.assert_allclose(found, numpy_overlaps(first, second), atol=1e-6)
    assert found[3, 0] == 1 and not found[:, 1].any()


def test_offsets_by_hand_and_back():
    rng = np.random.default_rng(1)
    boxes, anchors = random_boxes(rng, 50), random_boxes(rng, 50)
    anchors[0], boxes[0] = (10, 20, 20, 40), (12, 20, 32, 30)
    offsets = quick_jit(encoded)(boxes, anchors)
    np.testing.assert_allclose(offsets[0], [0.7, -0.25, np.log(2), -np.log(2)], rtol=1e-6)
    wild = np.float32([0, 0, 1e4, 0])
    back = np.asarray(quick_jit(decoded)(np.concatenate([offsets, [wild]]), np.concatenate([anchors, anchors[:1]])))
    np.testing.assert_allclose(back[:-1], boxes, atol=1e-4)
    np.testing.assert_allclose(back[-1, 2] - back[-1, 0], 10 * 1000 / 16, rtol=1e-5)


def numpy_matches(anchors, boxes, labels, ignored):
    """Box, positive and negative of one image, in loops."""
    found = numpy_overlaps(anchors, boxes)
    box, positive, negative = (np.zeros(len(anchors), kind) for kind in (int, bool, bool))
    for a in range(len(anchors)):
        there = [m for m in range(len(boxes)) if labels[m] >= 0]
        forced = [m for m in there if 0 < found[a, m] == found[:, m].max()]
        most = max((found[a, m] for m in there), default=-1.0)
        if forced or most >= 0.5:
            box[a] = max(forced or there, key=lambda m: found[a, m])
            positive[a] = not ignored[box[a]]
        negative[a] = not forced and most < 0.4
    return box, positive, negative


def test_matching_against_numpy():
    rng = np.random.default_rng(2)
    anchors = random_boxes(rng, 100)
    anchors[0] = (0, 0, 12, 12)
    boxes = random_boxes(rng, 8, 5)
    labels = rng.integers(-1, 4, (8, 5))
    labels[0] = -1  # an image without boxes
    boxes[labels < 0] = 0
    boxes[1, 0], labels[1, 0] = (0, 0, 3, 3), 2  # smaller than any anchor: still found by the one that fits best
    ignored = rng.random((8, 5)) < 0.3
    ignored[1, 0] = False
    found = jax.device_get(quick_jit(matched)(anchors, boxes, labels, ignored))
    for image in range(8):
        box, positive, negative = numpy_matches(anchors, boxes[image], labels[image], ignored[image])
        np.testing.assert_array_equal(found.positive[image], positive)
        np.testing.assert_array_equal(found.negative[image], negative)
        np.testing.assert_array_equal(found.box[image][positive], box[positive])
    _, positives, negatives = found
    assert not positives[0].any() and negatives[0].all()
    assert (positives[1] & (found.box[1] == 0)).any()
    assert not (positives & negatives).any() and (~positives & ~negatives).any(), "some are neither"


def test_focal_loss_against_numpy():
    rng = np.random.default_rng(3)
    logits, targets = rng.normal(0, 3, 100), rng.integers(0, 2, 100)
    p = 1 / (1 + np.exp(-logits))
    chosen, alpha = np.where(targets == 1, p, 1 - p), np.where(targets == 1, 0.25, 0.75)
    found = quick_jit(focal_loss)(logits, targets)
    np.testing.assert_allclose(found, -alpha * (1 - chosen) ** 2 * np.log(chosen), rtol=2e-5)
    ends, gammas = jnp.array([-200.0, -30, 0, 30, 200]), (0.0, 0.5, 2.0)
    gradient = quick_jit(jax.grad(lambda x: sum(focal_loss(x, t, gamma=g).sum() for t in (0, 1) for g in gammas)))
    assert np.isfinite(gradient(ends)).all()


def test_smooth_l1_by_hand():
    np.testing.assert_allclose(quick_jit(smooth_l1)(np.float32([0.0, 0.05, -1.0]), 0.1), [0.0, 0.0125, 0.95], rtol=1e-6)


def task_and_batch(rng, images=3, classes=4):
    anchors = random_boxes(rng, 60, least=8)
    task = Detection(anchors, classes, (64, 64))
    boxes, labels = random_boxes(rng, images, 5, least=8), rng.integers(-1, classes, (images, 5)).astype(np.int32)
    labels[0, 0] = 1
    boxes[labels < 0] = 0
    batch = {
        "image": np.zeros((images, 64, 64, 1), np.float32),
        "boxes": boxes,
        "label": labels,
        "ignored": rng.random((images, 5)) < 0.2,
        "mask": np.array([1.0] * (images - 1) + [0.0], np.float32),
    }
    outputs = {
        "logits": rng.normal(0, 2, (images, 60, classes)).astype(np.float32),
        "deltas": rng.normal(0, 0.3, (images, 60, 4)).astype(np.float32),
    }
    return task, outputs, batch


def test_the_loss_is_that_of_the_images_one_by_one():
    rng = np.random.default_rng(4)
    task, outputs, batch = task_and_batch(rng)
    expected = []
    for image in range(3):
        boxes, labels = np.asarray(batch["boxes"][image]), np.asarray(batch["label"][image])
        box, positive, negative = numpy_matches(task.anchors, boxes, labels, np.asarray(batch["ignored"][image]))
        targets = np.zeros((60, 4))
        targets[positive, labels[box[positive]]] = 1
        p = 1 / (1 + np.exp(-np.asarray(outputs["logits"][image], np.float64)))
        chosen, alpha = np.where(targets == 1, p, 1 - p), np.where(targets == 1, 0.25, 0.75)
        of_classes = (-alpha * (1 - chosen) ** 2 * np.log(chosen))[positive | negative].sum()
        own, wanted = task.anchors[positive].astype(np.float64), boxes[box[positive]].astype(np.float64)
        sides, wanted_sides = own[:, 2:] - own[:, :2], wanted[:, 2:] - wanted[:, :2]
        centres = (wanted[:, 2:] + wanted[:, :2] - own[:, 2:] - own[:, :2]) / 2 / sides
        offsets = np.hstack([centres, np.log(wanted_sides / sides)])
        error = np.abs(np.asarray(outputs["deltas"][image])[positive] - offsets)
        of_boxes = np.where(error < 1 / 9, error**2 * 4.5, error - 1 / 18).sum()
        expected.append(np.array([of_classes, of_boxes]) / max(positive.sum(), 1))
    loss_and_gradients = jax.value_and_grad(task.loss)
    compiled = quick_jit(lambda o, b: (task.measure(o, b), task.evaluate(o, b), loss_and_gradients(o, b)))
    found, part, (loss, gradients) = jax.device_get(compiled(outputs, batch))
    np.testing.assert_allclose([found["class_loss"], found["box_loss"]], np.mean(expected, axis=0), rtol=1e-4)
    np.testing.assert_allclose(loss, np.sum(expected) / 3, rtol=1e-4)
    assert part["count"] == 2
    np.testing.assert_allclose(part["loss"], np.sum(expected[:2]), rtol=1e-4)  # the third is masked
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in jax.tree.leaves(gradients))


def greedy(boxes, classes, valid, threshold):
    stays = []
    found = numpy_overlaps(boxes, boxes)
    for i in range(len(boxes)):
        if valid[i] and not any(classes[i] == classes[j] and found[i, j] > threshold for j in stays):
            stays.append(i)
    return np.isin(np.arange(len(boxes)), stays)


def test_suppression_is_the_greedy_one():
    found = quick_jit(kept)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        boxes = random_boxes(rng, 5, least=12)[rng.integers(0, 5, 80)] + rng.normal(0, 2, (80, 4)).astype(np.float32)
        classes, valid = rng.integers(0, 2, 80), rng.random(80) < 0.9
        stays = np.asarray(found(boxes, classes, valid, 0.5))
        np.testing.assert_array_equal(stays, greedy(boxes, classes, valid, 0.5))
        assert 2 < stays.sum() < 60
    # A chain, of which each suppresses the next: every second stays, after as many rounds as there are links.
    chain = np.stack([np.array([0, 3 * k, 10, 3 * k + 10]) for k in range(80)]).astype(np.float32)
    stays = found(chain, np.zeros(80, int), np.ones(80, bool), 0.5)
    np.testing.assert_array_equal(stays, np.arange(80) % 2 == 0)


def test_detections_by_hand():
    anchors = np.array([[0, 0, 10, 10], [0, 0, 10, 12], [50, 50, 70, 70], [30, 30, 40, 40]], np.float32)
    logits = np.full((1, 4, 2), -9.0, np.float32)
    logits[0, 0, 1], logits[0, 1, 1], logits[0, 1, 0], logits[0, 2, 0] = 3.0, 2.0, 1.0, 2.5
    deltas = np.zeros((1, 4, 4), np.float32)
    found = quick_jit(functools.partial(detections, size=(64, 64), most=5))(logits, deltas, anchors)
    # The second anchor loses class 1 to the first and keeps class 0; the third is cut off at the edge.
    np.testing.assert_array_equal(found.classes, [[1, 0, 0, -1, -1]])
    np.testing.assert_allclose(found.scores, [[*(1 / (1 + np.exp(-np.array([3, 2.5, 1])))), 0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(found.boxes[0, :3], [[0, 0, 10, 10], [50, 50, 64, 64], [0, 0, 10, 12]])
    assert not np.any(found.boxes[0, 3:])


def test_perfect_outputs_have_perfect_precision():
    rng = np.random.default_rng(5)
    task, _, batch = task_and_batch(rng)
    boxes = np.array([[[4.0, 4, 24, 20], [30, 40, 60, 50]]] * 3, np.float32)
    anchors = np.concatenate([boxes[0] + 1, task.anchors])
    task = Detection(anchors, 4, (64, 64))
    batch = {
        **batch,
        "boxes": boxes,
        "label": np.array([[0, 3]] * 3, np.int32),
        "ignored": np.zeros((3, 2), bool),
    }
    logits = np.full((3, 62, 4), -9.0, np.float32)
    logits[:, 0, 0] = logits[:, 1, 3] = 9.0
    logits[2] = 9.0  # masked
    deltas = np.zeros((3, 62, 4), np.float32)
    deltas[:, :2] = quick_jit(encoded)(boxes, anchors[:2])
    part = jax.device_get(quick_jit(task.evaluate)({"logits": logits, "deltas": deltas}, batch))
    found = task.summary([part, part])
    assert found["map"] == found["map50"] == 1.0
    assert found["loss"] == pytest.approx(float(part["loss"]) / 2)
