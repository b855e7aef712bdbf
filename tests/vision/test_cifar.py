"""CIFAR's official files are read exactly; what is damaged is named; no pickle is run."""

from __future__ import annotations

import io
import pickle
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ckptflip.errors import UsageError, WorkloadError
from ckptflip.vision import cifar

sys.path.insert(0, str(Path(__file__).parent))
import cifar_writer as writer

VERSIONS = list(writer.FOLDERS)


def check(found, data):
    """Pixels and labels are those that were written, in order."""
    written = writer.sets(data)
    *train, test = written.values()
    pixels = np.concatenate([part[0] for part in train]).reshape(-1, 3, 32, 32)
    assert found.name == data
    assert found.classes == {"cifar10": 10, "cifar100": 100}[data]
    assert found.train.pixels.dtype == np.uint8
    assert np.array_equal(found.train.pixels, pixels)
    assert found.train.labels.dtype == np.int64
    assert found.train.labels.tolist() == np.concatenate([part[1] for part in train]).tolist()
    assert np.array_equal(found.test.pixels.reshape(-1, 3072), test[0])
    assert found.test.labels.tolist() == test[1].tolist()


@pytest.mark.parametrize(("data", "version"), VERSIONS)
def test_each_version_in_its_folder_and_above_it(tmp_path, data, version):
    place = writer.write(tmp_path, data, version)
    check(cifar.read(place), data)
    check(cifar.read(tmp_path, data), data)
    assert cifar.kind_of(tmp_path) == data


@pytest.mark.parametrize(("data", "version"), VERSIONS)
def test_each_archive_by_name_and_in_its_folder(tmp_path, data, version):
    path = writer.archive(tmp_path, data, version)
    shutil.rmtree(tmp_path / "unpacked")
    check(cifar.read(path), data)
    check(cifar.read(tmp_path), data)


@pytest.mark.parametrize("dump", writer.DUMPS)
@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
def test_every_spelling_of_the_pickles(tmp_path, data, dump):
    check(cifar.read(writer.write(tmp_path, data, "python", dump)), data)


def test_the_hand_made_pickle_is_what_pickle_reads():
    """The layout of the tests is a real one: Python's own reader understands it."""
    pixels, labels = writer.images("cifar10", 4, 0)
    made = writer.python2(pixels, labels, "cifar10").replace(b"numpy.core.multi", b"numpy._core.multi")
    loaded = pickle.loads(made, encoding="bytes")
    assert np.array_equal(loaded[b"data"], pixels)
    assert loaded[b"labels"] == labels.tolist()


def test_a_label_byte_and_the_colours_lie_where_they_should(tmp_path):
    """Red, green, blue, each row by row: written out, so that no helper hides an error."""
    record = bytes([9]) + bytes([1] * 1024) + bytes([2] * 1024) + bytes([3] * 1023 + [77])
    for name in [f"{batch}.bin" for batch in writer.BATCHES]:
        (tmp_path / name).write_bytes(record)
    (tmp_path / "test_batch.bin").write_bytes(record)
    found = cifar.read(tmp_path)
    assert found.test.labels.tolist() == [9]
    assert found.test.pixels[0, :, 0, 0].tolist() == [1, 2, 3]
    assert found.test.pixels[0, 2, 31, 31] == 77
    assert found.test.pixels[0, 2, 31, 30] == 3


def test_both_data_sets_in_one_folder_need_a_word(tmp_path):
    writer.write(tmp_path, "cifar10", "binary")
    writer.write(tmp_path, "cifar100", "python")
    with pytest.raises(UsageError, match="say which, cifar10:"):
        cifar.read(tmp_path)
    check(cifar.read(tmp_path, "cifar100"), "cifar100")
    with pytest.raises(UsageError, match="not 'mnist'"):
        cifar.read(tmp_path, "mnist")


def cut(count):
    return lambda content: content[:count]


@pytest.mark.parametrize(
    ("version", "name", "alter", "said"),
    [
        ("python", "data_batch_2", cut(5000), "data_batch_2 is damaged .*Download"),
        ("python", "data_batch_2", cut(0), "damaged"),
        ("python", "test_batch", lambda c: c.replace(b"labels", b"lables"), "lacks labels.*lables"),
        ("python", "test_batch", lambda c: c.replace(b"u1", b"i1"), "no array of uint8"),
        ("python", "test_batch", lambda c: c.replace(b"\x00\x0c\x86", b"\x00\x0b\x86"), "no array of uint8"),
        ("python", "test_batch", lambda c: c.replace(b"_reconstruct", b"_reconstrict"), "no array"),
        ("python", "test_batch", lambda c: c.replace(b"(K\x01K\x03", b"(K\x01K\x04"), "does not hold 4"),
        ("python", "test_batch", lambda c: b"\x80\x02]q\x01.", "no dict"),
        ("python", "test_batch", lambda c: c.replace(b"\x05(K\x00", b"\x05(K\x0a"), "is 10; cifar10 has"),
        ("python", "test_batch", lambda c: c.replace(b"\x05(K\x00", b"\x05(N"), "no list of whole numbers"),
        ("python", "test_batch", lambda c: c.replace(b"\x05(K\x00", b"\x05("), "3 images, 2 labels"),
        ("binary", "data_batch_3.bin", cut(3073 * 2 + 100), "data_batch_3.bin is truncated"),
        ("binary", "data_batch_3.bin", cut(0), "truncated"),
        ("binary", "data_batch_3.bin", cut(3073 * 2), "do not fit together .*data_batch_3.bin 2"),
        ("binary", "test_batch.bin", cut(3073 * 2), "five times"),
        ("binary", "test_batch.bin", lambda c: b"\x0a" + c[1:], "label of image 0 is 10"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_named(tmp_path, version, name, alter, said):
    file = writer.write(tmp_path, "cifar10", version) / name
    before = file.read_bytes()
    file.write_bytes(alter(before))
    assert file.read_bytes() != before
    with pytest.raises(WorkloadError, match=said):
        cifar.read(tmp_path)


def test_cifar_100_cut_between_records_does_not_pass(tmp_path):
    file = writer.write(tmp_path, "cifar100", "binary") / "train.bin"
    file.write_bytes(file.read_bytes()[: 3074 * 14])
    with pytest.raises(WorkloadError, match=r"train\.bin 14, test\.bin 3"):
        cifar.read(tmp_path)


def test_missing_files_and_places_are_named(tmp_path):
    place = writer.write(tmp_path, "cifar10", "python")
    (place / "data_batch_4").unlink()
    with pytest.raises(UsageError, match=r"lacks data_batch_4: unpack the archive of cifar-10-batches-py"):
        cifar.read(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no official CIFAR files"):
        cifar.read(tmp_path / "empty")
    with pytest.raises(UsageError, match="no folder or archive"):
        cifar.read(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="no official CIFAR files"):
        cifar.read(place, "cifar100")


def test_a_damaged_archive_is_named(tmp_path):
    path = writer.archive(tmp_path, "cifar10", "binary")
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"not an archive", whole[:-20] + b"\0" * 20):
        path.write_bytes(content)
        with pytest.raises(WorkloadError, match="no sound"):
            cifar.read(path)


def test_an_archive_that_would_fill_the_memory_is_refused(tmp_path):
    member = tarfile.TarInfo("data_batch_1")
    member.size = 1 << 30
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as made:
        made.addfile(tarfile.TarInfo("readme"), io.BytesIO())
        made.fileobj.write(member.tobuf())
    with pytest.raises(WorkloadError, match="larger than any official"):
        cifar.read(path)


class Attack:
    """Would leave a file behind if a pickle were run."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return Path.touch, (self.place,)


def test_no_pickle_is_run(tmp_path):
    place = writer.write(tmp_path, "cifar10", "python")
    trace = tmp_path / "trace"
    (place / "data_batch_1").write_bytes(pickle.dumps({b"data": Attack(trace), b"labels": [1]}, protocol=2))
    with pytest.raises(WorkloadError, match="no array of uint8"):
        cifar.read(tmp_path)
    assert not trace.exists()


def test_normalised_pixels_have_the_training_set_s_mean_and_deviation():
    pixels = np.full((1, 3, 32, 32), 255, np.uint8)
    found = cifar.normalised(pixels, "cifar10")
    assert found.dtype == np.float32
    expected = [(1 - 0.4914) / 0.247, (1 - 0.4822) / 0.2435, (1 - 0.4465) / 0.2616]
    np.testing.assert_allclose(found[0, :, 0, 0], expected, rtol=1e-6)
    assert np.isclose(cifar.normalised(pixels * 0, "cifar100")[0, 2, 5, 5], -0.4409 / 0.2762)
