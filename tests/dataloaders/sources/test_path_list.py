"""Lists as other tools write them: read where they are plain, refused in one line that says what is wrong."""

from __future__ import annotations

import os
import shlex
import tarfile

import pytest

from mirl.dataloaders.sources.opening import open_source
from mirl.errors import UserError

NAMES = ["img dir/0.jpg", "img dir/1.jpg"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "img dir").mkdir()
    for name in NAMES:
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def read(folder, content, name="list.txt", **options):
    (folder / name).write_bytes(content)
    source = open_source(folder / name, **options)
    return [os.path.relpath(source.path(i), folder) for i in range(source.num_images)]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"  \n", b"\t \r\n", b"\n\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"# a comment\n", b"\n \n"])
def test_ends_of_lines_marks_and_comments(folder, start, end):
    assert read(folder, start + end.join(os.fsencode(name) for name in NAMES) + end) == NAMES


@pytest.mark.parametrize("name", ["LIST.TXT", "a.lst", "b.List", "no suffix", "c.csv"])
def test_a_list_is_known_by_any_usual_name(folder, name):
    assert read(folder, "\n".join(NAMES).encode(), name) == NAMES


def test_only_a_newline_ends_a_line_and_files_named_like_comments_are_files(folder):
    odd = [
        "#1.jpg",
        "nel\u0085x.jpg",
        "u\u2028v\x0c.jpg",
        " lead.jpg",
        "trail.jpg ",
        "tab\t7",
        os.fsdecode(b"latin\xe9.jpg"),
    ]
    for name in odd:
        (folder / name).write_bytes(b"x")
    assert read(folder, b"\n".join(os.fsencode(name) for name in NAMES + odd)) == NAMES + odd
    labelled = b"".join(os.fsencode(name) + b"\t%d\n" % number for number, name in enumerate(odd))
    assert read(folder, labelled) == odd
    source = open_source(folder / "list.txt", labels=True)
    assert [source.label(number) for number in range(len(odd))] == list(range(len(odd)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"img dir/0.jpg 0\n", r"'img dir/0.jpg 0' is a path, a space and '0'; put a tab before the label: sed -E"),
        (b"img dir/0.jpg,0\n", r"is a path, a comma and '0'; put a tab before the label: sed -E"),
        (b'"img dir/0.jpg"\n', "is a path in quotes; write it without them"),
        (b"img dir\\0.jpg\n", "has backslashes between folders; write /"),
        (b"path\nimg dir/0.jpg\n", "path does not exist; use absolute paths or .* without a heading"),
        (b"img dir\n", "is a folder; give the files in it, or the folder itself"),
        ("img dir/0.jpg\n".encode("utf-16"), "is UTF-16 or UTF-32 text: save it as UTF-8"),
        (b"img dir/0.jpg\0", "is no text"),
        (b"\xef\xbb\xbf\n", "names no image"),
        (b"img dir/0.jpg\t0\nimg dir/1.jpg\tcat\n", "is not 'path<TAB>label' as the first entry is; mend line 2"),
        ("img dir/0.jpg\t²\n".encode(), "is not 'path<TAB>label'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder, content, message):
    with pytest.raises(UserError, match=message) as caught:
        read(folder, content)
    assert str(caught.value).isprintable()


def test_the_command_that_a_refusal_gives_mends_the_list(folder):
    for mark in (" ", ","):
        with pytest.raises(UserError) as caught:
            read(folder, "".join(f"{name}{mark}{i}\n" for i, name in enumerate(NAMES)).encode())
        command = str(caught.value).partition("label: ")[2]
        assert os.system(command) == 0
        source = open_source(*shlex.split(command.rpartition(" > ")[2]), labels=True)
        assert [source.label(i) for i in (0, 1)] == [0, 1]


def test_one_image_or_an_archive_is_no_data_set(folder):
    with pytest.raises(UserError, match="0.jpg is one image, not a data set: give its folder"):
        open_source(folder / NAMES[0])
    (folder / "a.tar.gz").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(UserError, match="is not a folder, a list"):
        open_source(folder / "a.tar.gz")


@pytest.mark.parametrize("count", [5, 100])  # asked for one by one, or by reading their folder once
def test_what_is_listed_and_not_there_is_left_out_and_counted(count, tmp_path):
    for place in ("a", "b/c"):
        (tmp_path / place).mkdir(parents=True)
        for number in range(count):
            (tmp_path / place / f"{number}.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "a" / "2.jpg").unlink()
    (tmp_path / "a" / "3.jpg").unlink()
    (tmp_path / "a" / "3.jpg").mkdir()
    (tmp_path / "a" / "4.jpg").unlink()
    (tmp_path / "a" / "4.jpg").symlink_to("nowhere")
    names = [f"{place}/{number}.jpg" for number in range(count) for place in ("a", "b/c")] + ["no/such.jpg"]
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{name}\t{number}\n" for number, name in enumerate(names)))
    source = open_source(listed, labels=True, every_name=True)
    gone = {"a/2.jpg", "a/3.jpg", "a/4.jpg", "no/such.jpg"}
    there = [name for name in names if name not in gone]
    assert [source.path(index) for index in range(source.num_images)] == [str(tmp_path / name) for name in there]
    assert [source.label(index) for index in range(len(there))] == [names.index(name) for name in there]
    assert (
        str(source.ledger) == f"{2 * count - 3} images from {2 * count + 1} files (4 left out: 4 listed but not there)"
    )
    assert {path for path, _ in source.ledger.names} == {str(tmp_path / name) for name in gone}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('"img dir/1.jpg"', "its entry '\"img dir/1.jpg\"' is a path in quotes; write it without them"),
        ("img dir/1.jpg\t3", r"its entry .* has a label, '3', and the first entry has none; give all or none"),
        ("img dir/1.jpg,3", "its entry 'img dir/1.jpg,3' is a path, a comma and '3'; put a tab before the label"),
        ("img dir\\1.jpg", "its entry .* has backslashes between folders; write /"),
    ],
)
@pytest.mark.parametrize("gone", [0, 99])
def test_what_is_wrong_with_a_later_entry_is_said_too(folder, entry, message, gone):
    """Such an image was counted as one that is not there."""
    lines = [NAMES[0], *(f"img dir/gone {number}.jpg" for number in range(gone)), entry]
    with pytest.raises(UserError, match=message):
        read(folder, "\n".join(lines).encode())
    assert read(folder, "\n".join(lines[:-1]).encode()) == [NAMES[0]]


def test_a_list_of_shards_is_told_from_one_of_images(folder):
    with tarfile.open(folder / "a.tar", "w") as tar:
        tar.add(folder / NAMES[0])
    with pytest.raises(UserError, match="its first entry 'a.tar' is a tar shard; give the shards, or a folder"):
        read(folder, b"a.tar\n")
