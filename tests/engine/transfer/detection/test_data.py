"""COCO files are read as they are meant or refused in one line; pictures and objects are transformed alike."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mirl.dataloaders.order import StepPlan
from mirl.dataloaders.tools.composite_sets import CATEGORY_IDS
from mirl.dataloaders.tools.composites import CASES, Composer
from mirl.engine.transfer.detection.annotations import CocoSet, Objects, require_same_classes
from mirl.engine.transfer.detection.config import DetectSection
from mirl.engine.transfer.detection.loader import DetectionLoader, evaluation_batches
from mirl.engine.transfer.detection.transforms import by_short_side, evaluation_size, for_training, pad_together
from mirl.errors import UserError

CPU = torch.device("cpu")


def changed(composites: Path, tmp_path: Path, change) -> Path:
    """A copy of train.json after ``change(values)``."""
    values = json.loads((composites / "train.json").read_text())
    change(values)
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(values))
    return path


def test_objects_are_what_was_pasted_in_every_form_and_edge_case(composites):
    data = CocoSet(composites / "train.json", composites / "train")
    composer, forms = Composer(size=(64, 64), seed=1, fashion=None), set()
    for index in range(data.num_images):
        made = composer.make("train", index, [*CASES, "plain", "plain"][index])
        found, wanted = data.objects(index), [item for item in made.instances if not item.crowd]
        assert np.array_equal(found.masks, np.stack([item.mask for item in wanted]) if wanted else found.masks)
        assert found.labels.tolist() == [1 + item.category for item in wanted]
        boxes = np.array([item.box for item in wanted], float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        assert np.array_equal(found.boxes, boxes)
        assert data.picture(index).shape == (*made.labels.shape, 3)
        forms |= {type(item["segmentation"]).__name__ for item in data.of_image(data.image_ids[index])}
    assert forms == {"list", "dict"}
    assert data.category_ids == CATEGORY_IDS and data.names == composer.names
    assert (data.empty, data.crowds, data.num_images) == (1, 1, 12)
    assert "1 images without objects" in str(data)


def test_the_fingerprint_is_of_pictures_and_objects_and_not_of_the_folder(composites, tmp_path):
    data = CocoSet(composites / "train.json", composites / "train")
    same = changed(composites, tmp_path, lambda values: values.update(info={"year": 2026}))
    assert CocoSet(same, composites / "train").fingerprint == data.fingerprint
    other = changed(composites, tmp_path, lambda values: values["annotations"].pop())
    assert CocoSet(other, composites / "train").fingerprint != data.fingerprint


WRONG = {
    "no category": (lambda v: v.update(categories=[]), "list of categories is empty"),
    "twice one name": (lambda v: v["categories"][0].update(name="sun"), "two categories are called 'sun'"),
    "missing image": (lambda v: v["images"][0].update(file_name="gone.png"), "1 of 12 images .* first is gone.png"),
    "no image": (lambda v: v.update(images=[]), "lists no image"),
    "flat box": (lambda v: v["annotations"][0].update(bbox=[3, 3, 0, 5]), "1 of .* boxes are degenerate"),
    "outside": (lambda v: v["annotations"][0].update(bbox=[900, 3, 4, 5]), "degenerate .*--degenerate drop"),
    "nan": (lambda v: v["annotations"][0].update(bbox=[float("nan"), 3, 4, 5]), "degenerate"),
    "no mask": (lambda v: v["annotations"][0].update(segmentation=[]), "segmentation that is empty"),
    "a line": (lambda v: v["annotations"][0].update(segmentation=[[1, 2, 3, 4]]), "three points"),
    "other size": (
        lambda v: v["annotations"][0].update(segmentation={"size": [3, 3], "counts": [9]}), "segmentation of size"
    ),
    "unknown class": (lambda v: v["annotations"][0].update(category_id=3), "category_id 3, which no category has"),
    "unknown image": (lambda v: v["annotations"][0].update(image_id=2), "image_id 2, which no image has"),
    "twice one id": (lambda v: v["images"][1].update(id=1), "two of kind image have the id 1"),
    "no list": (lambda v: v.pop("annotations"), "has no list 'annotations'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_trained_on_is_refused_in_one_line(name, composites, tmp_path):
    change, text = WRONG[name]
    with pytest.raises(UserError, match=text) as refused:
        CocoSet(changed(composites, tmp_path, change), composites / "train")
    assert "\n" not in str(refused.value) and ": " in str(refused.value)


def test_other_things_than_a_coco_file_are_refused(composites, tmp_path):
    (tmp_path / "text.json").write_text("no json")
    for path, text in (
        (composites / "train", "a folder: give a COCO file .* mirl segment"),
        (tmp_path / "none.json", "does not exist"),
        (tmp_path / "text.json", "cannot be read as JSON"),
        (composites / "train" / "00000.png", "cannot be read as JSON"),
    ):
        with pytest.raises(UserError, match=text):
            CocoSet(path, composites / "train")


def test_degenerate_boxes_are_dropped_where_that_is_asked_for(composites, tmp_path):
    path = changed(composites, tmp_path, lambda values: values["annotations"][0].update(bbox=[3, 3, 0, 5]))
    whole = CocoSet(composites / "train.json", composites / "train")
    data = CocoSet(path, composites / "train", degenerate="drop")
    assert (data.dropped, data.objects_in_all) == (1, whole.objects_in_all - 1)


def test_missing_area_and_crowd_are_filled_in(composites, tmp_path):
    def without(values):
        for item in values["annotations"]:
            del item["area"]
            if not item["iscrowd"]:
                del item["iscrowd"]

    data = CocoSet(changed(composites, tmp_path, without), composites / "train")
    whole = CocoSet(composites / "train.json", composites / "train")
    assert {key: (item["area"], item["iscrowd"]) for key, item in data.coco.anns.items()} == {
        key: (item["area"], item["iscrowd"]) for key, item in whole.coco.anns.items()
    }


def test_classes_are_compared_by_name(composites, tmp_path):
    train = CocoSet(composites / "train.json", composites / "train")
    require_same_classes(train, CocoSet(composites / "val.json", composites / "val"))
    other = changed(composites, tmp_path, lambda values: values["categories"][0].update(name="moon"))
    with pytest.raises(UserError, match="val has 'moon', which data lacks; val lacks 'star'"):
        require_same_classes(train, CocoSet(other, composites / "train"))


def square(height: int = 40, width: int = 60) -> tuple[np.ndarray, Objects]:
    """A picture that is white in one rectangle, which is its object."""
    mask = np.zeros((1, height, width), np.uint8)
    mask[0, 10:30, 12:42] = 1
    box = np.array([[12.0, 10.0, 42.0, 30.0]], np.float32)
    return (255 * mask[0])[..., None].repeat(3, axis=2), Objects(boxes=box, labels=np.array([2]), masks=mask)


@pytest.mark.parametrize("variant", ["paper", "vitdet"])
def test_image_box_and_mask_go_the_same_way(variant):
    section, sizes, mirrored, lost = DetectSection(variant=variant), set(), set(), 0
    for position in range(40):
        sample = for_training(*square(), section, (80, 120) if variant == "paper" else (64, 64), (0, 0, position))
        height, width = sample.image.shape[1:]
        sizes.add((height, width))
        assert sample.original == (40, 60)
        if not len(sample.target["boxes"]):
            lost += 1
            continue
        mask, (box,) = sample.target["masks"][0].bool(), sample.target["boxes"].tolist()
        bright = sample.image[0] > 127
        # One pixel of the outline may be rounded otherwise: nearest against bilinear.
        assert (mask != bright).sum() <= 2 * (height + width)
        rows, columns = (mask.any(dim=axis).nonzero()[:, 0] for axis in (1, 0))
        seen = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert np.allclose(seen, box, atol=1.01), (seen, box)
        mirrored.add(bool(columns[0] > width - 1 - columns[-1]))
    assert mirrored == {True, False}
    if variant == "paper":
        assert {min(size) for size in sizes} == {round(80 * (0.6 + 0.04 * n)) for n in range(11)} and not lost
    else:
        assert max(max(size) for size in sizes) == 64 and min(min(size) for size in sizes) < 15 and len(sizes) > 20


def test_transforms_are_a_function_of_their_key():
    section = DetectSection(variant="vitdet")
    one, again, other = (for_training(*square(), section, (64, 64), (0, 1, place)) for place in (3, 3, 4))
    assert torch.equal(one.image, again.image) and one.image.shape != other.image.shape


def test_sizes_of_evaluation():
    assert by_short_side(480, 640, 800, 1333) == (800, 1067) and by_short_side(200, 1000, 800, 1333) == (267, 1333)
    assert evaluation_size("vitdet", 480, 640, (1024, 1024)) == (768, 1024)
    padded = pad_together(
        [torch.ones(3, 20, 33, dtype=torch.uint8), torch.ones(3, 40, 8, dtype=torch.uint8)], (1, 1), 16
    )
    assert padded.shape == (2, 48, 48, 3) and padded[0, :20, :33].all() and not padded[0, 20:].any()


def loader(composites: Path, **plan) -> DetectionLoader:
    data = CocoSet(composites / "train.json", composites / "train")
    parts = {"num_images": data.num_images, "micro_batch": 2, "accumulation": 1, "rank": 0, "world_size": 1} | plan
    return DetectionLoader(
        data, StepPlan(**parts), DetectSection(), size=(64, 96), multiple=16, seed=0, device=CPU, threads=2
    )  # fmt: skip


def test_the_loader_goes_on_where_it_was_and_ranks_share_a_step(composites):
    whole = loader(composites, micro_batch=4)
    batches = [whole.next_micro_batch() for _ in range(4)]
    assert [batch.epoch for batch in batches] == [0, 0, 0, 1]
    again = loader(composites)  # two micro-batches a step on one rank of two: the second half of each
    halves = [loader(composites, rank=rank, world_size=2) for rank in (0, 1)]
    state = whole.state_dict() | {"step": 2}
    for half in halves:
        half.load_state_dict(state)
        assert half.step == 2
    found = [half.next_micro_batch() for half in halves]
    ids = np.concatenate([batch.sample_ids for batch in found])
    assert ids.tolist() == batches[2].sample_ids.tolist()
    sizes = [size for batch in found for size in batch.sizes]
    assert sizes == batches[2].sizes and all(
        torch.equal(one["boxes"], two["boxes"])
        for one, two in zip((t for b in found for t in b.targets), batches[2].targets, strict=True)
    )
    with pytest.raises(UserError, match="effective_batch is 2, the checkpoint has 4"):
        again.load_state_dict(state)
    for one in (whole, again, *halves):
        one.close()


def test_a_broken_picture_is_replaced_named_and_counted(composites, tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    for path in (composites / "train").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "00003.png").write_bytes(b"broken")
    Image.new("RGB", (5, 5)).save(folder / "00005.png")
    data = CocoSet(composites / "train.json", folder)
    plan = StepPlan(num_images=12, micro_batch=12, accumulation=1, rank=0, world_size=1)
    made = DetectionLoader(data, plan, DetectSection(), size=(64, 96), multiple=16, seed=0, device=CPU, threads=2)
    batch = made.next_micro_batch()
    made.close()
    assert sorted(batch.sample_ids.tolist()) == sorted([*set(range(12)) - {3, 5}, 4, 6])
    assert {Path(bad.path).name for bad in made.bad_images} == {"00003.png", "00005.png"} and made.too_many_bad
    assert "is 5x5 pixels" in "".join(bad.reason for bad in made.bad_images)
    assert "2 of 12 images are broken" in str(made.bad_limit_error())


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 2), (2, 2), (3, 1)])
def test_evaluation_shows_every_image_once_on_any_number_of_ranks(world_size, batch_size, composites):
    data = CocoSet(composites / "val.json", composites / "val")
    seen, rounds = [], set()
    for rank in range(world_size):
        batches = list(
            evaluation_batches(
                data, rank=rank, world_size=world_size, batch_size=batch_size, variant="paper", size=(64, 96),
                multiple=16, device=CPU, channels=3, threads=1,
            )
        )  # fmt: skip
        rounds.add(len(batches))
        for batch in batches:
            assert all(side % 16 == 0 for side in batch.images.shape[1:3])
            seen += [int(index) for index in batch.sample_ids if index >= 0]
    assert sorted(seen) == [0, 1, 2, 3, 4] and len(rounds) == 1


def test_a_missing_pycocotools_is_told_with_what_to_install(composites, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(UserError, match="pycocotools is not installed .*: pip install 'pycocotools>=2.0.8' .*detect"):
        CocoSet(composites / "train.json", composites / "train")
