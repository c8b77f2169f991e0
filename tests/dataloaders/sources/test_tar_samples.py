"""Which part of a sample is the image: WebDataset's meaning where it is one, and no choice behind anybody's back."""

from __future__ import annotations

import io
import tarfile

import pytest

from mirl.dataloaders.sources.opening import open_source
from mirl.dataloaders.sources.tar_index import make_index
from mirl.errors import UserError


def write(path, *members):
    with tarfile.open(path, "w") as tar:
        for member in members:
            info = tarfile.TarInfo(member)
            data = b"7" if member.endswith("cls") else member.encode()
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def images(path, **options):
    make_index(path, progress=False, **options)
    source = open_source(path)
    try:
        return [source.path(i).partition("::")[2] for i in range(source.num_images)], str(source.ledger)
    finally:
        source.close()


def test_the_photograph_is_taken_and_not_the_depth_map_before_it(tmp_path):
    shard = write(tmp_path / "x.tar", *(f"{i}.{ext}" for i in range(3) for ext in ("depth.png", "jpg", "json")))
    found, text = images(shard)
    assert found == ["0.jpg", "1.jpg", "2.jpg"]
    assert text == "3 images from 9 members of 1 tar shard (6 left out: 3 .depth.png beside the image, 3 .json)"


def test_the_flag_takes_another_part_and_the_index_remembers_it(tmp_path):
    shard = write(tmp_path / "x.tar", *(f"{i}.{ext}" for i in range(2) for ext in ("depth.png", "jpg", "cls")))
    assert images(shard)[0] == ["0.jpg", "1.jpg"]
    assert images(shard, image_part=".Depth.PNG")[0] == ["0.depth.png", "1.depth.png"]  # renews a fresh index
    found, text = images(shard)
    assert found == ["0.depth.png", "1.depth.png"] and "2 .jpg beside --image-part depth.png" in text
    assert "2 from part depth" in text
    assert images(shard, image_part="each")[0] == ["0.depth.png", "0.jpg", "1.depth.png", "1.jpg"]
    source = open_source(shard, labels=True)
    assert [source.label(i) for i in range(4)] == [7, 7, 7, 7]
    source.close()
    assert images(shard, force=True)[0] == ["0.jpg", "1.jpg"]


@pytest.mark.parametrize("parts", [("left.png", "right.png"), ("jpg", "png"), ("jpg", "jpeg", "depth.png")])
def test_several_images_in_a_sample_are_refused_and_the_mend_works(tmp_path, parts):
    shard = write(tmp_path / "x.tar", *(f"a b/{i}.{ext}" for i in range(2) for ext in parts))
    with pytest.raises(UserError) as caught:
        make_index(shard, progress=False)
    command = f"mirl make-index --image-part {parts[0]} {shard}"
    assert f"sample 'a b/0' has {len(parts)} image parts ({', '.join(parts)})" in str(caught.value)
    assert str(caught.value).endswith(command) and not shard.with_suffix(".idx").exists()
    assert images(shard, image_part=parts[0])[0] == [f"a b/{i}.{parts[0]}" for i in range(2)]
    assert len(images(shard, image_part="each")[0]) == 2 * len(parts)


def test_an_ambiguous_index_of_another_tool_is_refused_when_it_is_opened(tmp_path):
    shard = write(tmp_path / "x.tar", "0.left.png", "0.right.png")
    (tmp_path / "x.idx").write_text("v1.2 1\nleft.png 512 10 0.left.png right.png 1536 11 0.right.png\n")
    with pytest.raises(UserError, match="has 2 image parts .*mirl make-index --image-part left.png"):
        open_source(shard)
    assert images(shard, image_part="right.png")[0] == ["0.right.png"]


NAMES = [
    *(f"Screenshot 2024-03-01 at 10.{m:02d}.{m:02d} PM.png" for m in range(4)),
    "J. Smith.jpg", "J. Jones.jpg", "v1.0.1-cat.jpg", "v1.0.2-cat.jpg", "mean 0.5.JPG", "mean 0.5.jpg", "x..jpg",
]  # fmt: skip


def test_dots_in_names_lose_no_image(tmp_path):
    found, text = images(write(tmp_path / "x.tar", *NAMES))
    assert found == NAMES and text == f"{len(NAMES)} images from {len(NAMES)} members of 1 tar shard"


def test_labels_of_samples_with_dots_in_their_names(tmp_path):
    shard = write(
        tmp_path / "x.tar", "at 1.2 PM.jpg", "at 1.2 PM.cls", "at 1.3 PM.jpg", "at 1.3 PM.cls", "s.0.jpg", "s.cls"
    )
    make_index(shard, progress=False)
    source = open_source(shard, labels=True)
    assert [source.label(i) for i in range(source.num_images)] == [7, 7, 7]
    source.close()


def test_a_member_that_is_there_twice_is_two_images(tmp_path):
    assert images(write(tmp_path / "x.tar", "a.jpg", "a.cls", "a.jpg", "a.cls"))[0] == ["a.jpg", "a.jpg"]
