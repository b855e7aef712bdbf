"""Tracks: rows as they were, also when not finite; damaged files are named by their line."""

import math

import pytest

from ckptflip.errors import RecordError
from ckptflip.training import track
from ckptflip.training.track import Flips, Header, Row, Track

HEADER = Header(workload="w", seed=1, start_epoch=0, until=2, flips=Flips(record="r", counts={"hit": 1}))


def write(path, *rows):
    with track.writing(path, HEADER) as writer:
        for row in rows:
            writer.append(row)
        return writer.track


def test_a_track_comes_back(tmp_path):
    rows = (
        Row(epoch=0, accuracy=0.1, loss=2.3, nan=0),
        Row(
            epoch=1, train_loss=1e300, loss=math.inf, grad_norm=-math.inf, extra={"auc": 0.5, "odd": math.inf}
        ),
    )
    written = write(tmp_path / "deep" / "t.jsonl", *rows)
    assert track.read(tmp_path / "deep" / "t.jsonl") == written == Track(HEADER, rows)
    text = (tmp_path / "deep" / "t.jsonl").read_text()
    assert '"inf"' in text
    assert '"-inf"' in text


def test_nan_is_kept_apart_from_not_measured(tmp_path):
    write(tmp_path / "t.jsonl", Row(epoch=0, loss=math.nan))
    (row,) = track.read(tmp_path / "t.jsonl").rows
    assert math.isnan(row.loss)
    assert row.train_loss is None
    assert '"loss":"nan"' in (tmp_path / "t.jsonl").read_text()


def test_rows_are_on_disk_while_the_run_goes_on(tmp_path):
    with track.writing(tmp_path / "track.jsonl", HEADER) as writer:
        assert track.read(tmp_path).rows == ()
        writer.append(Row(epoch=0))
        assert track.read(tmp_path).rows == (Row(epoch=0),)


def test_a_cut_off_last_line_is_left_out(tmp_path):
    path = tmp_path / "t.jsonl"
    write(path, Row(epoch=0), Row(epoch=1))
    path.write_bytes(path.read_bytes()[:-9])
    assert track.read(path).rows == (Row(epoch=0),)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no header"),
        (b"hello\n", "line 1"),
        (b'{"schema":"track/9","workload":"w","start_epoch":0,"until":1}\n', "track/9"),
        (b'{"workload":"w"}\n', "line 1.*start_epoch"),
        (b'{"workload":"w","start_epoch":0,"until":1}\n{"epoch":0}\n{"epoch":"x"}\n', "line 3"),
        (b'{"workload":"w","start_epoch":0,"until":1}\n\xff\xfe\n', "line 2"),
        (b'{"workload":"w","start_epoch":0,"until":1}\n\n{"epoch":1}\n', "line 2"),
    ],
)
def test_malformed_files_are_named_by_their_line(tmp_path, content, said):
    (tmp_path / "t.jsonl").write_bytes(content)
    with pytest.raises(RecordError, match=said) as caught:
        track.read(tmp_path / "t.jsonl")
    assert str(tmp_path / "t.jsonl") in str(caught.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(RecordError, match=r"no track .*nothing\.jsonl"):
        track.read(tmp_path / "nothing.jsonl")
    with pytest.raises(RecordError, match=r"no track .*track\.jsonl"):
        track.read(tmp_path)
