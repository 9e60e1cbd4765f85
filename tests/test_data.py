"""The readers open what they say and refuse the rest in one line, before any work; batches come whole and in order.

Winnow's own.
"""

from __future__ import annotations

import importlib.util
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from winnow.data import UnreadableImage, check_labels, open_images
from winnow.data.batches import batches, cached

SHARED = Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the shared data folder is not here")


def picture(path: Path, value: int = 100, size: tuple[int, int] = (12, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 255 - value)).save(path)
    return path


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    for i in range(5):
        picture(tmp_path / "pictures" / f"{i}.png", 10 * i)
    head = "file,label,class_name,author,license,split\n"
    rows = [f"pictures/{i}.png,{i % 3},class {i % 3},Ada,CC0,{'val' if i > 2 else 'train'}" for i in range(5)]
    path = tmp_path / "list.csv"
    path.write_text(head + "\n".join(rows) + "\n", encoding="utf-8-sig")
    return path


def refused(message: str, spec: object, kind: type[Exception] = ValueError, **settings: object) -> None:
    with pytest.raises(kind, match=message) as caught:
        open_images(str(spec), **settings)  # type: ignore[arg-type]
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


class TestCsv:
    def test_reads(self, listed):
        images = open_images(str(listed))
        image, label = images[4]
        assert (len(images), label, image.mode, image.size) == (5, 1, "RGB", (12, 8))
        assert image.getpixel((0, 0)) == (40, 0, 215)
        assert (images.name, images.key(4), images.label_range) == ("list", "pictures/4.png", (0, 2))
        assert images.classes == ["class 0", "class 1", "class 2"]
        assert images.credit(0) == "Ada, CC0"
        assert sum(1 for _ in images) == 5

    def test_split_limit_and_slice(self, listed):
        assert len(open_images(str(listed), split="val")) == 2
        part = open_images(str(listed), split="train[-2:]")
        assert (part.split, [part.key(i) for i in range(2)]) == ("train[-2:]", ["pictures/1.png", "pictures/2.png"])
        assert (part[0][1], part[0][0].getpixel((0, 0))[0]) == (1, 10)
        spread = open_images(str(listed), limit=2)
        assert [spread.key(i) for i in range(len(spread))] == ["pictures/0.png", "pictures/2.png"]
        refused("no rows of split 'test' .*train, val", listed, split="test")
        refused("selects none of the 5", listed, split="[5:]")
        refused("not understood", listed, split="train[a:]")
        refused("limit=0", listed, limit=0)

    def test_other_column_names(self, tmp_path):
        picture(tmp_path / "a.png")
        path = tmp_path / "x.csv"
        path.write_text("path,target\na.png,7\n")
        assert open_images(str(path), image_column="path", label_column="target")[0][1] == 7
        assert open_images(str(path), image_column="path", label_column="").labels is None
        refused("no column 'file' .there are: path, target.*image_column", path)
        refused("no column 'label' .*label_column", path, image_column="path")
        refused("no column 'split'", path, image_column="path", label_column="target", split="val")

    def test_refusals(self, tmp_path, listed):
        path = tmp_path / "x.csv"
        path.write_text("file,label\n")
        refused("no rows", path)
        path.write_text("")
        refused("there are: none", path)
        path.write_text("file,label\npictures/0.png,cat\n")
        refused("label 'cat' in the row of 'pictures/0.png' is not an integer", path)
        path.write_text("file,label\npictures/0.png\n")
        refused("label None .* is not an integer", path)
        path.write_text("file,label\npictures/0.png,1\ngone.png,1\nlost.png,2\n")
        refused("2 of 3 files that are not there, the first is .*gone.png", path, FileNotFoundError)
        path.write_bytes(b"file,label\n\xff\xfe.png,1\n")
        refused("not a CSV file in UTF-8", path)
        refused("no such file or folder", tmp_path / "none.csv", FileNotFoundError)

    def test_labels_outside_the_model(self, listed):
        images = open_images(str(listed))
        check_labels(images, 3)
        with pytest.raises(ValueError, match=r"label 2 of pictures/2.png .* 2 classes"):
            check_labels(images, 2)

    def test_hash_follows_content(self, listed):
        first = open_images(str(listed)).hash
        assert first == open_images(str(listed)).hash
        assert len(first) == 16
        assert first != open_images(str(listed), limit=4).hash
        listed.write_text(listed.read_text(encoding="utf-8-sig").replace("0.png,0", "0.png,2"))
        assert first != open_images(str(listed)).hash


class TestDecoding:
    def test_truncated_and_wrong_files_are_named(self, tmp_path):
        whole = tmp_path / "a.jpg"
        Image.effect_noise((64, 64), 50).convert("RGB").save(whole)
        whole.write_bytes(whole.read_bytes()[:600])
        (tmp_path / "b.png").write_bytes(b"not a picture")
        (tmp_path / "c.png").write_bytes(b"")
        images = open_images(str(tmp_path))
        for i, name in enumerate(("a.jpg", "b.png", "c.png")):
            with pytest.raises(UnreadableImage, match=f"{name} cannot be decoded") as caught:
                images[i]
            assert "\n" not in str(caught.value)

    def test_exif_and_modes(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was held on its side
        Image.new("RGB", (12, 8)).save(tmp_path / "0.jpg", exif=exif)
        Image.new("L", (4, 4), 7).save(tmp_path / "1.png")
        Image.new("CMYK", (4, 4)).save(tmp_path / "2.jpg")
        Image.new("RGBA", (4, 4), (1, 2, 3, 0)).save(tmp_path / "3.png")
        Image.fromarray(np.full((4, 4), 0x4000, np.uint16)).save(tmp_path / "4.png")
        found = [image for image, _ in open_images(str(tmp_path))]
        assert {image.mode for image in found} == {"RGB"}
        assert found[0].size == (8, 12)
        assert found[1].getpixel((0, 0)) == (7, 7, 7)
        assert found[4].getpixel((0, 0)) == (64, 64, 64)


class TestFolder:
    def test_class_folders(self, tmp_path):
        for name in ("b/1.png", "a/2.jpg", "a/deep/3.PNG", "c/4.webp"):
            picture(tmp_path / name)
        (tmp_path / "a" / "notes.txt").write_text("not an image")
        (tmp_path / ".cache").mkdir()
        images = open_images(str(tmp_path))
        assert (images.classes, images.labels) == (["a", "b", "c"], [0, 0, 1, 2])
        assert images.key(1) == "a/deep/3.PNG"

    def test_flat_folder_has_no_labels(self, tmp_path):
        picture(tmp_path / "b.png")
        picture(tmp_path / "a.png")
        images = open_images(str(tmp_path))
        assert ([images.key(i) for i in range(2)], images[0][1], images.labels) == (["a.png", "b.png"], None, None)
        assert (images.classes, images.label_range) == (None, None)
        refused("no columns", tmp_path, label_column="label")

    def test_splits(self, tmp_path):
        for name in ("train/a/1.png", "val/a/1.png", "val/b/2.png"):
            picture(tmp_path / name)
        assert open_images(str(tmp_path), split="val").labels == [0, 1]
        refused("holds the splits train, val", tmp_path)
        refused("no folder for split 'test' .*train, val", tmp_path, FileNotFoundError, split="test")

    def test_refusals(self, tmp_path):
        refused("holds no images", tmp_path)
        picture(tmp_path / "images" / "1.png")
        (tmp_path / "list.csv").write_text("file,label\nimages/1.png,3\n")
        refused("one sub-folder and the list list.csv", tmp_path)
        picture(tmp_path / "loose.png")
        refused("both beside and inside", tmp_path)
        refused("no such file or folder", tmp_path / "gone", FileNotFoundError)
        refused("unknown data 'imagenet': give", "imagenet")
        refused("is not images that Winnow reads", picture(tmp_path / "one.gif"))


def as_distributed(data: np.ndarray, labels: list[int]) -> bytes:
    """A CIFAR batch byte by byte as Python 2 pickled it."""

    def text(value: str) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode()

    n = len(data)
    dtype = (
        b"cnumpy\ndtype\n("
        + text("u1")
        + b"K\x00K\x01tR(K\x03"
        + text("|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    raw = b"T" + struct.pack("<i", data.nbytes) + data.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text("b") + b"tR"
    array += b"(K\x01(K" + bytes([n]) + b"M\x00\x0ct" + dtype + b"I00\n" + raw + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text("data") + array + text("fine_labels") + listed + b"u."


class TestCifar:
    @pytest.fixture
    def data(self) -> np.ndarray:
        return np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)

    def test_as_distributed(self, tmp_path, data):
        folder = tmp_path / "cifar-100-python"
        folder.mkdir()
        (folder / "test").write_bytes(as_distributed(data, [3, 1, 0, 2]))
        (folder / "train").write_bytes(as_distributed(data[:2], [0, 1]))
        (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": [b"apple", b"baby", b"bear", b"bee"]}))
        for spec in (folder, tmp_path):
            images = open_images(str(spec))
            assert (images.name, images.split, images.labels) == ("cifar-100-python", "test", [3, 1, 0, 2])
        assert images.classes == ["apple", "baby", "bear", "bee"]
        assert np.array_equal(np.asarray(images[2][0]), data[2].reshape(3, 32, 32).transpose(1, 2, 0))
        assert len(open_images(str(folder), split="train[:1]")) == 1
        refused("no split 'val' .*train, test", folder, split="val")
        refused("has no 'coarse_labels' .there are: data, fine_labels", folder, label_column="coarse_labels")

    def test_cifar10(self, tmp_path, data):
        for i in range(1, 6):
            batch = {b"data": data, b"labels": [i] * 4, b"filenames": [b"f%d.png" % i] * 4}
            (tmp_path / f"data_batch_{i}").write_bytes(pickle.dumps(batch))
        images = open_images(str(tmp_path))
        assert (len(images), images.split, images.labels[-1], images.key(19)) == (20, "train", 5, "f5.png")
        (tmp_path / "data_batch_3").unlink()
        refused("4 of the 5 files", tmp_path, FileNotFoundError)

    def test_pickles_run_nothing(self, tmp_path, data):
        class Trap:
            def __reduce__(self):
                return open, (str(tmp_path / "sprung"), "w")

        (tmp_path / "test").write_bytes(pickle.dumps({b"data": data, b"labels": Trap()}))
        refused("asks for .*open, which no CIFAR file needs", tmp_path)
        assert not (tmp_path / "sprung").exists()

    def test_damage(self, tmp_path, data):
        whole = pickle.dumps({b"data": data, b"labels": [0, 1, 2]})
        for content, message in (
            (whole, "3 labels for 4 images"),
            (whole[:1000], "not a CIFAR pickle"),
            (pickle.dumps({b"data": data[:, :99], b"labels": [0] * 4}), "n x 3072"),
            (pickle.dumps({b"data": data, b"labels": ["cat"] * 4}), "not a list of integers"),
        ):
            (tmp_path / "test").write_bytes(content)
            refused(message, tmp_path)


class TestParquet:
    @pytest.fixture
    def table(self, tmp_path):
        pa = pytest.importorskip("pyarrow")
        encoded = [picture(tmp_path / "made" / f"{i}.png", 10 * i).read_bytes() for i in range(7)]
        rows = [{"bytes": one, "path": f"{i}.png"} for i, one in enumerate(encoded)]
        return pa.table({"img": rows, "fine_label": list(range(7))})

    @staticmethod
    def write(table, path: Path) -> Path:
        import pyarrow.parquet as pq

        path.parent.mkdir(exist_ok=True)
        pq.write_table(table, path, row_group_size=3)
        return path

    def test_file_and_folder(self, tmp_path, table):
        one = self.write(table, tmp_path / "shards" / "train-00000-of-00002.parquet")
        self.write(table.slice(0, 2), tmp_path / "shards" / "train-00001-of-00002.parquet")
        (tmp_path / "shards" / "classes.txt").write_text("".join(f"kind {i}\n" for i in range(7)))
        assert len(open_images(str(one))) == 7
        images = open_images(str(one.parent))
        assert (len(images), images.split, images.key(8), images[8][1]) == (9, "train", "1.png", 1)
        assert [images[i][0].getpixel((0, 0))[0] for i in (6, 0, 8, 3)] == [60, 0, 10, 30]
        assert images.classes[6] == "kind 6"
        assert open_images(str(one.parent), split="train[-2:]").split == "train[-2:]"
        assert pickle.loads(pickle.dumps(images))[5][1] == 5

    def test_lazy(self, tmp_path, table):
        images = open_images(str(self.write(table, tmp_path / "x.parquet")))
        images[4]
        assert list(images._read._kept) == [1]

    def test_columns(self, tmp_path, table):
        path = self.write(table.rename_columns(["scan", "kind"]), tmp_path / "x.parquet")
        assert open_images(str(path), label_column="kind").labels == list(range(7))
        assert open_images(str(path), image_column="scan.bytes", label_column="").labels is None
        refused("no label column .there are: scan, kind", path)
        refused("no column 'y'", path, label_column="y")
        refused("no image column 'x' .there are: scan, kind", path, image_column="x")
        refused("labels are integers", path, label_column="scan")

    def test_refusals(self, tmp_path, table, monkeypatch):
        path = self.write(table, tmp_path / "shards" / "test-0.parquet")
        self.write(table, tmp_path / "shards" / "train-0.parquet")
        refused("several splits .test, train", path.parent)
        refused("no parquet files of split 'val'", path.parent, split="val")
        refused("no rows", self.write(table.slice(0, 0), tmp_path / "empty.parquet"))
        broken = tmp_path / "broken.parquet"
        broken.write_bytes(path.read_bytes()[:-20])
        refused("not a readable parquet file", broken)
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
        refused(r"pip install \"winnow-vision\[data\]\"", path)

    def test_row_without_bytes(self, tmp_path):
        pa = pytest.importorskip("pyarrow")
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table({"image": pa.array([{"bytes": None, "path": "a.png"}], kind), "label": [0]})
        with pytest.raises(UnreadableImage, match=r"a\.png .*paths are not followed"):
            open_images(str(self.write(table, tmp_path / "x.parquet")))[0]


class TestPhotographs:
    def test_opens(self):
        if importlib.util.find_spec("skimage") is None:
            pytest.skip("scikit-image is not installed")
        images = open_images("photographs")
        assert (len(images), images.labels, images.name) == (42, None, "photographs")
        assert len({images[i][0].tobytes() for i in range(42)}) == 42
        assert images.key(8) == "chelsea-1"
        assert "CC0" in images.credit(8)
        assert open_images("photographs", limit=6).key(5) == "rocket-0"
        refused("no split 'test'", "photographs", split="test")

    def test_without_scikit_image(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        refused(r"winnow-vision\[demo\]", "photographs")


class TestBatches:
    @pytest.mark.parametrize("workers", [0, 3])
    def test_in_order_and_whole(self, listed, workers):
        seen: list[int] = []
        found = list(batches(open_images(str(listed)), to_tensor, 2, workers=workers, progress=seen.append))
        assert [batch.indices for batch in found] == [[0, 1], [2, 3], [4]]
        assert torch.cat([batch.labels for batch in found]).tolist() == [0, 1, 2, 0, 1]
        assert torch.cat([batch.images for batch in found])[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 40]
        assert seen == [2, 4, 5]

    def test_without_labels(self, listed):
        assert next(batches(open_images(str(listed), label_column=""), to_tensor, 2)).labels is None

    @pytest.mark.parametrize("workers", [0, 2])
    def test_broken_image_is_named(self, listed, workers):
        images = open_images(str(listed))
        (listed.parent / "pictures" / "3.png").write_bytes(b"gone bad")
        with pytest.raises(UnreadableImage, match=r"3\.png"):
            list(batches(images, to_tensor, 2, workers=workers))

    def test_refusals(self, listed, tmp_path):
        images = open_images(str(listed))
        with pytest.raises(ValueError, match="batch_size=0"):
            batches(images, to_tensor, 0)
        with pytest.raises(ValueError, match="workers=-1"):
            cached(images, to_tensor, 1, workers=-1)
        picture(tmp_path / "pictures" / "1.png", size=(5, 5))
        with pytest.raises(ValueError, match=r"\[3, 8, 12\] for image 0 and \[3, 5, 5\] for image 1"):
            next(batches(images, to_tensor, 2))

    def test_cached_decodes_once_if_it_fits(self, listed):
        images = open_images(str(listed))
        done: list[int] = []

        def counted(image: Image.Image) -> torch.Tensor:
            done.append(1)
            return to_tensor(image)

        seen: list[int] = []
        kept = cached(images, counted, 2, progress=seen.append)
        next(iter(kept))
        first, second = list(kept), list(kept)
        assert (len(kept), kept.kept, len(done)) == (3, 3, 5)
        assert all(torch.equal(a.images, b.images) and a.indices == b.indices for a, b in zip(first, second))
        assert seen == [2, 2, 4, 5, 2, 4, 5]
        done.clear()
        for a, b in zip(both := cached(images, counted, 2), both):
            assert a.indices == b.indices
        assert (both.kept, len(done)) == (3, 5)
        done.clear()
        large = cached(images, counted, 2, limit_mib=0.001)
        assert sum(len(batch.indices) for _ in range(2) for batch in large) == 10
        assert (large.kept, len(done)) == (0, 10)


@needs_shared
class TestShared:
    def test_cifar100(self):
        images = open_images(str(SHARED / "data" / "cifar100"), split="train[-5000:]")
        assert (len(images), images.label_range, len(images.classes)) == (5000, (0, 99), 100)
        image, label = images[4999]
        assert (image.size, 0 <= label < 100) == ((32, 32), True)

    def test_photos(self):
        images = open_images(str(SHARED / "data" / "photos" / "photos.csv"))
        assert (len(images), images.classes[388]) == (500, "giant panda")
        assert "creativecommons.org" in images.credit(0)
        check_labels(images, 1000)
        refused("open .*photos.csv", SHARED / "data" / "photos")
