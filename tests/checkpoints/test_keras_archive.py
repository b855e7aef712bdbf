"""`.keras` archives: HDF5 inside a zip, with the checksums of both, and archives that were made to harm."""

from __future__ import annotations

import base64
import io
import json
import struct
import sys
import zipfile
import zlib

import h5py
import keras_backends
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ckptflip
from ckptflip.checkpoints.keras import archive
from ckptflip.errors import CheckpointError, CkptflipError

KERNEL = np.arange(12, dtype="f4").reshape(3, 4)
CONFIG = {
    "class_name": "Sequential",
    "config": {
        "name": "s",
        "layers": [{"class_name": "Dense", "config": {"name": "head", "use_bias": True}}],
    },
}
WEIGHTS = archive.WEIGHTS


def weights(build=None, **options):
    """An HDF5 file as Keras writes one, with what `build` adds."""
    data = io.BytesIO()
    with h5py.File(data, "w", **options) as file:
        group = file.create_group("layers/dense/vars")
        group.attrs["name"] = "head"
        group["0"], group["1"] = KERNEL, np.ones(4, "f4")
        if build:
            build(file)
    return data.getvalue()


def archived(path, data=None, method=zipfile.ZIP_STORED, config=CONFIG, before=(), after=()):
    """A `.keras` file of these members."""
    with zipfile.ZipFile(path, "w") as out:
        for name, each in before:
            out.writestr(name, each)
        out.writestr("metadata.json", b'{"keras_version": "3.15.1"}')
        if config is not None:
            out.writestr("config.json", config if isinstance(config, bytes) else json.dumps(config))
        out.writestr(WEIGHTS, weights() if data is None else data, compress_type=method)
        for name, each in after:
            out.writestr(name, each, compress_type=zipfile.ZIP_DEFLATED)
    return path


def inside(path, name=WEIGHTS):
    """A member of an archive, whatever its checksum."""
    with zipfile.ZipFile(path) as found:
        info = found.getinfo(name)
        with found.open(info) as member:
            member._expected_crc = None
            return member.read()


def datasets(path):
    """All datasets of the weights in an archive."""
    found = {}
    with h5py.File(io.BytesIO(inside(path))) as file:
        file.visititems(lambda n, o: found.update({n: o[()]}) if isinstance(o, h5py.Dataset) else None)
    return found


def crcs(path):
    """The CRC-32 of the weights where the archive stores it: in its header, in its directory."""
    data = path.read_bytes()
    with zipfile.ZipFile(path) as found:
        info = found.getinfo(WEIGHTS)
    entry = data.rindex(b"PK\1\2", 0, data.rindex(WEIGHTS.encode()))
    return struct.unpack_from("<L", data, info.header_offset + 14)[0], struct.unpack_from(
        "<L", data, entry + 16
    )[0]


# What Keras 3.15 wrote of Sequential([Input((2,)), Dense(1, name="head")]), the configuration cut down.
GOLDEN = (
    "c-rk+K~EDw6rS0ovO$R@A%Qli%My`9Xu3r_V4^hw)<9$<97qf)D;;U2Y_YpV2x;_KJ$dx#(Ia}QH*a#}C-@V*dBmO0OuI9*NDw1Q"
    "=S!w<-p+gbwlm+p+02YJt9JAPf<f>-;(Si}HC(#=vVlB1V|#Y&g<EiTjdfJC-SieJy19a5OzOsX%$$gs#;9)iRw(V-TPTCCC*q0Q"
    "W2QNlFq854WPE(`mT8nNF4Vi5J72%}HC!(GWwqcu&#lowt9jdX(~iA?@ZA>B%Mx<DoSny!h@pRd*T~yD{<HYir=rUvXS3wZ;by^w"
    "8RU#|c~lqOrjX;J79Lq-XK+)=Md@cb8;A9ZB~&gimji#z1Eu9Vzp68%!vNqC#=Tg`pnU8V%B^KRH<q1vo0^*G?uvHR95fAd)T|mf"
    "q`>|`owct}38}15`AK2dVXdv7Uhkpz7ws0GOiyF$Ljf$#j}Va>kZ4Dwrte!=E>WHFX<y;(w(O#dC3zhiyiA@lE(9va-!SFxNGH#K"
    "!e7vmzY>zaLH@ElRtbrGBe2dW?!x2wDF~E$R<HE&arUTw5aFLoS9!Y>)w7}Y96vU1iT!YiW)=uSpx5s`JVRqW0%6S~T<=4T>rXu4"
    "RyrGf{P4m290b%su)}cc-yK9}X|IDy{6!Fa-s)xf&Phl}NJvOXNJvOXNJvPWH?&$O7uRS0v`(&F0fE&9iFSjy&dApNenxn^4BlM="
    "f%UzA#NW**(ccf8jKASQ$zRFeqx{_);O*Ex&sp)8tdqk!?^035YtWR(60Pz;^Zl|VgXk;ZWO?9Vh#!B6_Ra&0PgR|_i&JR={(ViJ"
    "Q68|a^7q}Q`UhQ((Q#n&zt~@=-7mxYTx`Egq5d#n0Ko{63ar}%{Y72%8HMXT`Zc<Trh`5W^u4C-AwNEDR}^wXjWSS$`$NsYP`3Yb"
    "kAJ&|f7pI6d%CJ|ycf%_{nsUD`FTv_7a4yDA;+V?=hMh=gW*9`&RLJVxogcrrB`izLa%OF`-j|lJ<(M>ao2EN2i*C)pkuT1Yz@a5"
    "c=U9eH5<A>Mn|oM`gj9tzX5_KG`j"
)


def test_golden_bytes(tmp_path):
    path = tmp_path / "golden.keras"
    path.write_bytes(zlib.decompress(base64.b85decode(GOLDEN)))
    with ckptflip.opened(path) as target:
        found = [(t.name, t.shape, t.dtype, t.offset, t.layout, t.aliases) for t in target.tensors]
        assert target.format == "keras"
    data = path.read_bytes()
    assert found == [
        (
            "head/kernel",
            (2, 1),
            "float32",
            data.index(struct.pack("<2f", 1.5, -2)),
            "contiguous",
            ("layers/dense/vars/0",),
        ),
        (
            "head/bias",
            (1,),
            "float32",
            data.index(struct.pack("<f", 0.25)),
            "contiguous",
            ("layers/dense/vars/1",),
        ),
    ]
    ckptflip.inject(path, in_place=True, tensors="head/bias", bits="sign", count=1)
    expected = data.replace(struct.pack("<f", 0.25), struct.pack("<f", -0.25))
    crc = struct.pack("<L", zlib.crc32(inside(path)))
    old = struct.pack("<L", zlib.crc32(weights_of(data)))
    assert expected.count(old) == 2 and path.read_bytes() == expected.replace(old, crc)


def weights_of(data):
    with zipfile.ZipFile(io.BytesIO(data)) as found:
        return found.read(WEIGHTS)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("checksum", ["repair", "leave"])
def test_only_the_words_and_the_checksums_change(tmp_path, in_place, checksum):
    path = archived(tmp_path / "a.keras", after=[("assets/words.txt", b"x" * 999)])
    old, before = path.read_bytes(), crcs(path)
    out = path if in_place else tmp_path / "b.keras"
    record = ckptflip.inject(
        path, in_place=in_place, out=None if in_place else out, count=5, seed=1, checksum=checksum
    )
    new = out.read_bytes()
    flipped = sum((a ^ b).bit_count() for a, b in zip(old, new, strict=True))
    if checksum == "leave":
        assert flipped == 5 and crcs(out) == before and record.header.checksums == ()
        with zipfile.ZipFile(out) as found:
            assert found.testzip() == WEIGHTS
    else:
        assert crcs(out) == (zlib.crc32(inside(out)),) * 2
        assert flipped == 5 + 2 * (before[0] ^ crcs(out)[0]).bit_count()
        assert [(c.before, c.after) for c in record.header.checksums] == [(before[0], crcs(out)[0])] * 2
    assert ckptflip.undo(out, record).digest_matches and out.read_bytes() == old


def test_a_checksum_that_was_wrong_stays_wrong(tmp_path):
    path = archived(tmp_path / "a.keras")
    rest = ckptflip.inject(path, out=tmp_path / "rest.keras", count=1, seed=1, checksum="leave")
    ckptflip.inject(tmp_path / "rest.keras", out=tmp_path / "b.keras", count=1, seed=2)
    with zipfile.ZipFile(tmp_path / "b.keras") as found:
        assert found.testzip() == WEIGHTS
    ckptflip.undo(tmp_path / "b.keras", rest)
    ckptflip.undo(tmp_path / "b.keras", ckptflip.replay(rest, path, dry_run=True))


@pytest.mark.parametrize("reached", [0, 1, 2])
def test_an_interrupted_run_is_undone(tmp_path, reached):
    """Killed before the first checksum, or between its two places."""
    path = archived(tmp_path / "a.keras")
    old = path.read_bytes()
    record = ckptflip.inject(path, in_place=True, count=5, seed=1)
    data = bytearray(path.read_bytes())
    for entry in record.header.checksums[reached:]:
        struct.pack_into("<L", data, entry.offset, entry.before)
    path.write_bytes(data)
    assert ckptflip.undo(path, record).digest_matches and path.read_bytes() == old


def with_sum(file):
    file.create_dataset("layers/extra/vars/0", data=np.arange(40, dtype="f8"), chunks=(8,), fletcher32=True)


@pytest.mark.parametrize("checksum", ["repair", "leave"])
def test_the_checksums_of_both_files(tmp_path, checksum):
    path = archived(tmp_path / "a.keras", weights(with_sum))
    old = path.read_bytes()
    record = ckptflip.inject(path, in_place=True, tensors="extra", count=9, seed=1, checksum=checksum)
    with zipfile.ZipFile(path) as found:
        assert found.testzip() == (None if checksum == "repair" else WEIGHTS)
    if checksum == "repair":
        assert (datasets(path)["layers/extra/vars/0"] != np.arange(40)).sum() > 0
    else:
        with pytest.raises(OSError, match="filter returned failure"):
            datasets(path)
    assert ckptflip.undo(path, record).digest_matches and path.read_bytes() == old


@pytest.mark.parametrize(
    "options", [{"userblock_size": 512}, {"libver": "latest"}], ids=["user block", "latest"]
)
def test_layouts_of_the_weights(tmp_path, options):
    def build(file):
        file.create_dataset("layers/extra/vars/0", data=np.arange(40, dtype=">i4"), chunks=(7,))
        file["layers/extra/vars/1"] = np.arange(5, dtype="f2")

    path = archived(tmp_path / "a.keras", weights(build, **options), before=[("odd", b"x" * 77)])
    before = datasets(path)
    record = ckptflip.inject(path, in_place=True, tensors="extra", count=30, seed=1)
    after = datasets(path)
    changed = sum(
        int(
            np.bitwise_count(
                np.frombuffer(before[n].tobytes(), "u1") ^ np.frombuffer(a.tobytes(), "u1")
            ).sum()
        )
        for n, a in after.items()
    )
    assert changed == record.bits_effective == 30
    with zipfile.ZipFile(path) as found:
        assert found.testzip() is None


def compressed(file):
    data = np.arange(4000, dtype="f4") // 8
    file.create_dataset("layers/extra/vars/0", data=data, chunks=(1000,), compression="gzip")
    file.create_dataset("layers/extra/vars/1", (100,), "f4", chunks=(10,))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("checksum", ["repair", "leave"])
@pytest.mark.parametrize("in_place", [True, False])
def test_what_cannot_be_patched_goes_through_a_copy(tmp_path, method, checksum, in_place):
    extras = {"before": [("z.txt", b"first")], "after": [("assets/a.txt", b"last" * 99)]}
    path = archived(tmp_path / "a.keras", weights(compressed), method, **extras)
    before, sums = datasets(path), crcs(path)
    out = path if in_place else tmp_path / "b.keras"
    record = ckptflip.inject(
        path,
        in_place=in_place,
        out=None if in_place else out,
        tensors=["extra", "head"],
        count=60,
        design="tensor",
        seed=1,
        checksum=checksum,
    )
    after = datasets(out)
    changed = sum(
        int(np.bitwise_count(before[n].reshape(-1).view("u4") ^ a.reshape(-1).view("u4")).sum())
        for n, a in after.items()
    )
    assert changed == record.bits_effective == 60 and len(record.header.tensors) == 4
    with zipfile.ZipFile(out) as found:
        assert found.testzip() == (None if checksum == "repair" else WEIGHTS)
        names = ["z.txt", "metadata.json", "config.json", WEIGHTS, "assets/a.txt"]
        assert found.namelist() == names and found.read("assets/a.txt") == b"last" * 99
        assert found.getinfo(WEIGHTS).compress_type == method
    assert crcs(out) == (sums if checksum == "leave" else (zlib.crc32(inside(out)),) * 2)
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]
    ckptflip.undo(out, record)
    np.testing.assert_equal(datasets(out), before)


def test_a_deflated_archive_is_listed_and_read(tmp_path):
    path = archived(tmp_path / "a.keras", method=zipfile.ZIP_DEFLATED)
    with ckptflip.opened(path) as target:
        assert {(t.name, t.layout, t.offset) for t in target.tensors} == {
            ("head/kernel", "contiguous, deflated", None),
            ("head/bias", "contiguous, deflated", None),
        }
        assert not target.by_patching([0])
        np.testing.assert_array_equal(target.read(0, np.arange(12)), KERNEL.reshape(-1).view("u4"))
    assert {r.status for r in ckptflip.diff(path, archived(tmp_path / "b.keras"))} == {"same"}


def test_data_in_other_files_is_left_out(tmp_path):
    (tmp_path / "secret.bin").write_bytes(bytes(16))

    def build(file):
        file.create_dataset("ext", (4,), "f4", external=[(str(tmp_path / "secret.bin"), 0, 16)])
        layout = h5py.VirtualLayout((4,), "f4")
        layout[:] = h5py.VirtualSource("other.h5", "x", (4,))
        file.create_virtual_dataset("virtual", layout)
        file["soft"], file["far"] = h5py.SoftLink("/layers"), h5py.ExternalLink("other.h5", "/")

    path = archived(tmp_path / "a.keras", weights(build))
    with ckptflip.opened(path) as target:
        assert {t.name for t in target.tensors} == {"head/kernel", "head/bias"}
        assert {s.name: s.reason for s in target.skipped} == {
            "ext": "kept outside the archive",
            "virtual": "kept outside the archive",
            "far": "a link to another file; name that file instead",
        }


def test_a_hard_link_inside_is_one_tensor(tmp_path):
    def build(file):
        file["layers/tied/vars/0"] = file["layers/dense/vars/0"]

    with ckptflip.opened(archived(tmp_path / "a.keras", weights(build))) as target:
        found = {t.name: t.aliases for t in target.tensors}
    assert found["head/kernel"] == ("layers/dense/vars/0", "layers/tied/vars/0")


def refused(path, match):
    with pytest.raises(CheckpointError, match=match), ckptflip.opened(path):
        pass


def test_archives_of_other_things(tmp_path):
    path = tmp_path / "a.keras"
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("config.json", "{}")
    with pytest.raises(CkptflipError, match=r"zip|known format"), ckptflip.opened(path):
        pass
    with pytest.raises(CheckpointError, match="no model that Keras 3 saved"):
        archive.open_checkpoint(path)
    refused(archived(path, b"no HDF5 at all"), "not an HDF5 file")
    refused(archived(path, weights()[:900]), "truncated")
    refused(archived(path, method=zipfile.ZIP_BZIP2), "method 12")


@pytest.mark.parametrize(
    "config",
    [b"{", b"[" * 200_000, b'{"config": ' * 100_000, b"\xff", b"", b"[" * 10_000 + b"]" * 10_000],
)
def test_a_configuration_that_is_none_is_refused(tmp_path, config):
    refused(archived(tmp_path / "a.keras", config=config), "is no configuration of a Keras model")


@pytest.mark.parametrize(
    "config",
    [
        None,
        [],
        3,
        {"config": []},
        {"config": {"layers": 5}},
        {"config": {"layers": [5, {}, {"class_name": 3, "config": {"name": 7, "trainable": "x"}}]}},
        {"compile_config": {"optimizer": {"config": {"inner_optimizer": 5}}}},
        {"compile_config": 7, "config": {"layers": [{"class_name": "Dense", "config": {"name": "a\nb"}}]}},
    ],
)
def test_a_configuration_of_no_known_form_is_passed_over(tmp_path, config):
    with ckptflip.opened(archived(tmp_path / "a.keras", config=config)) as target:
        assert [t.name for t in target.tensors] == ["head/kernel", "head/bias"]


def test_models_within_models_without_end(tmp_path):
    config = {"class_name": "Sequential", "config": {"layers": []}}
    for _ in range(300):
        config = {"class_name": "Sequential", "config": {"layers": [config]}}
    with ckptflip.opened(archived(tmp_path / "a.keras", config=config)) as target:
        assert len(target.tensors) == 2


def patched(path, change):
    """An archive with numbers of its directory and headers changed: {name: (field, value)}."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as found:
        infos = {i.filename: i for i in found.infolist()}
    for name, (local, central, value) in change.items():
        entry = data.index(b"PK\1\2", 0)
        while data[entry + 46 : entry + 46 + len(name)] != name.encode():
            entry = data.index(b"PK\1\2", entry + 4)
        struct.pack_into("<L", data, infos[name].header_offset + local, value)
        struct.pack_into("<L", data, entry + central, value)
    path.write_bytes(data)
    return path


def test_members_that_claim_too_much(tmp_path):
    path = tmp_path / "a.keras"
    # The size of the contents: of deflated ones nothing else tells it.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("config.json", json.dumps(CONFIG))
        out.writestr(WEIGHTS, weights())
    data = path.read_bytes()
    refused(patched(path, {"config.json": (22, 24, 1 << 30)}), "claims 1073741824 bytes")
    path.write_bytes(data)
    refused(patched(path, {WEIGHTS: (22, 24, (1 << 32) - 2)}), "no weights do|4294967294")
    path.write_bytes(data)
    refused(patched(path, {WEIGHTS: (22, 24, len(weights()) - 1)}), "more than it claims")
    path.write_bytes(data)
    refused(patched(path, {WEIGHTS: (22, 24, len(weights()) + 1)}), "1 bytes are missing")
    path.write_bytes(data)
    refused(patched(path, {WEIGHTS: (18, 20, 1 << 30)}), "damaged|overlaps")


def test_a_bomb_is_refused(tmp_path, soon):
    refused(archived(tmp_path / "a.keras", bytes(300 << 20), zipfile.ZIP_DEFLATED), "no weights do")


def test_every_truncation_is_refused(tmp_path):
    whole = archived(tmp_path / "a.keras", after=[("assets/a", b"x" * 50)]).read_bytes()
    path = tmp_path / "b.keras"
    for end in [
        *range(0, 200, 7),
        *range(200, len(whole) - 400, 131),
        *range(len(whole) - 400, len(whole), 3),
    ]:
        path.write_bytes(whole[:end])
        with pytest.raises(CheckpointError), ckptflip.opened(path):
            pass


@pytest.fixture(scope="module")
def some(tmp_path_factory):
    """A folder; archives with the places in them that are no weights."""
    folder, found = tmp_path_factory.mktemp("fuzz"), []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = archived(folder / "whole.keras", method=method, before=[("z", b"1")], after=[("a", b"2" * 9)])
        with zipfile.ZipFile(path) as open_zip:
            info = open_zip.getinfo(WEIGHTS)
        start = info.header_offset + 30 + len(WEIGHTS)
        whole = path.read_bytes()
        found.append((whole, [*range(start), *range(start + info.compress_size, len(whole))]))
    return folder, found


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_anywhere_ends_in_a_clear_error_or_none(some, data):
    """Anywhere but in the weights: libhdf5 itself can hang on damaged metadata."""
    folder, originals = some
    whole, places = originals[data.draw(st.integers(0, 1))]
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        at = places[data.draw(st.integers(0, len(places) - 1))]
        piece = data.draw(
            st.sampled_from([b"\0", b"\xff", b"\xff" * 4, b"\xff" * 8, b"\x7f", b"PK\1\2", b"\1"])
        )
        damaged[at : at + len(piece)] = piece[: len(damaged) - at]
    path = folder / "damaged.keras"
    path.write_bytes(damaged)
    try:
        with ckptflip.opened(path) as target:
            for i in range(len(target.tensors)):
                for _ in target.blocks(i):
                    pass
    except CkptflipError as why:
        assert str(why)
    assert path.read_bytes() == damaged


@pytest.mark.skipif(not keras_backends.INSTALLED, reason="Keras is not installed")
def test_keras_notices_a_checksum_that_was_left_as_far_as_zipfile_does(tmp_path):
    made = keras_backends.fastest()
    source = made.folder / "cnn.keras"
    ckptflip.inject(source, out=tmp_path / "rest.keras", tensors="head", count=1, seed=1, checksum="leave")
    if sys.version_info >= (3, 13):
        made.ask("load", str(tmp_path / "rest.keras"), "cnn")
        return
    with pytest.raises(RuntimeError, match=r"BadZipFile: Bad CRC-32 for file 'model.weights.h5'"):
        made.ask("load", str(tmp_path / "rest.keras"), "cnn")


@pytest.mark.skipif(not keras_backends.INSTALLED, reason="Keras is not installed")
@pytest.mark.parametrize("form", [".weights.h5", ".h5", ".weights.json"])
def test_keras_notices_nothing_elsewhere(tmp_path, form):
    made = keras_backends.fastest()
    source, out = made.folder / f"cnn{form}", tmp_path / f"rest{form}"
    ckptflip.inject(source, out=out, tensors="head", count=1, seed=1, checksum="leave", forbid=["nan"])
    made.ask("load", str(out), "cnn")
