"""The file of layers, the thread that reads it, and the ring: what comes out is what was stored."""

import gc
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphopt import GraphoptError
from graphopt.passes.layer_channels import FileChannel, measured_read
from graphopt.passes.layer_file import PAGE, LayerFile, record_of, write_layers
from graphopt.passes.layer_ring import LayerRing

CPU = torch.device("cpu")


def block(seed: int, size: int = 300) -> dict[str, Tensor]:
    """Tensors of several types, one transposed, one scalar, one with gaps."""
    torch.manual_seed(seed)
    return {
        "a": torch.randn(size, 3),
        "b": torch.randn(5, 7, dtype=torch.float64).t(),
        "c": torch.randn(11).to(torch.bfloat16),
        "d": torch.tensor(float(seed)),
        "e": torch.randn(8, 8)[:, ::2],
        "f": torch.randint(0, 2, (9,), dtype=torch.bool),
    }


def ring_of(folder: Path, count: int, slots: int, **options: Any) -> LayerRing:
    file = write_layers(folder, [block(i) for i in range(count)], is_temporary=False)
    return LayerRing(FileChannel(file, **options), slots, CPU)


def check_record(got: Any, seed: int) -> None:
    expected = block(seed)
    values = got.values() if isinstance(got, dict) else got
    for value, (name, tensor) in zip(values, expected.items(), strict=True):
        assert value.dtype == tensor.dtype and torch.equal(value, tensor), name
        if name != "e":  # one with gaps is stored without them
            assert value.stride() == tensor.stride(), name
        assert value.data_ptr() % 64 == 0


def test_records_begin_on_pages(tmp_path: Path) -> None:
    file = write_layers(tmp_path, [block(0), block(1, 4000)], is_temporary=False)
    assert [record.nbytes % PAGE for record in file.records] == [0, 0]
    assert all(start % PAGE == 0 for start in file._starts)
    assert file.path.stat().st_size == file._starts[1] + file.records[1].nbytes
    assert [path.name for path in tmp_path.iterdir()] == [file.path.name]


def test_the_same_layers_are_written_once(tmp_path: Path) -> None:
    first = write_layers(tmp_path, [block(0)], is_temporary=False)
    before = first.path.stat().st_mtime_ns
    assert write_layers(tmp_path, [block(0)], is_temporary=False).path == first.path
    assert first.path.stat().st_mtime_ns == before
    assert write_layers(tmp_path, [block(1)], is_temporary=False).path != first.path
    first.path.write_bytes(first.path.read_bytes()[:-1])
    write_layers(tmp_path, [block(0)], is_temporary=False)
    assert first.path.stat().st_size == PAGE + first.records[0].nbytes


@given(st.lists(st.integers(0, 4), max_size=12), st.integers(1, 5))
def test_any_order_gives_the_right_layers(tmp_path_factory: Any, order: list[int], slots: int) -> None:
    ring = ring_of(tmp_path_factory.mktemp("layers"), 5, slots)
    for record in order:
        check_record(ring.take(record), record)
        ring.give_back()
    ring.close()


def test_all_in_order_for_several_rounds(tmp_path: Path) -> None:
    ring = ring_of(tmp_path, 5, 2)
    for record in [*range(5)] * 3:
        check_record(ring.take(record), record)
        ring.give_back()
    check_record(ring.tensors(3), 3)
    assert ring.nbytes == 2 * record_of(block(0)).nbytes


def test_a_layer_in_use_is_not_overwritten(tmp_path: Path) -> None:
    ring = ring_of(tmp_path, 4, 3)
    held = ring.take(0)
    time.sleep(0.05)  # the others are read meanwhile
    check_record(held, 0)
    with pytest.raises(GraphoptError, match="one thread at a time"):
        ring.take(1)
    check_record(held, 0)


def test_the_header_is_checked(tmp_path: Path) -> None:
    path = write_layers(tmp_path, [block(0)], is_temporary=False).path
    data = bytearray(path.read_bytes())
    for place, message in ((3, "no file of layers"), (100, "header is damaged")):
        damaged = data.copy()
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(GraphoptError, match=message):
            LayerFile(path, is_temporary=False)
    path.write_bytes(data[:-PAGE])
    with pytest.raises(GraphoptError, match=rf"{len(data) - PAGE} bytes; its header says {len(data)}"):
        LayerFile(path, is_temporary=False)
    with pytest.raises(GraphoptError, match="cannot be read"):
        LayerFile(tmp_path / "none", is_temporary=False)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GraphoptError, match="cannot be written"):
        write_layers(tmp_path / "file", [block(0)], is_temporary=False)


def test_a_damaged_record_is_found(tmp_path: Path) -> None:
    path = write_layers(tmp_path, [block(0), block(1)], is_temporary=False).path
    data = bytearray(path.read_bytes())
    data[-PAGE] ^= 1
    path.write_bytes(data)
    ring = ring_of(tmp_path, 2, 1)
    check_record(ring.take(0), 0)
    ring.give_back()
    for _ in range(2):  # the error does not go away, and the other layer stays
        with pytest.raises(GraphoptError, match="record 1 is not what was written"):
            ring.take(1)
        check_record(ring.take(0), 0)
        ring.give_back()
    with pytest.raises(GraphoptError, match="record 1 is not what was written"):
        ring.tensors(1)


def test_a_file_that_is_cut_while_it_is_open(tmp_path: Path) -> None:
    file = write_layers(tmp_path, [block(0), block(1)], is_temporary=False)
    with open(file.path, "r+b") as other:
        other.truncate(file._starts[1] + 5)
    ring = LayerRing(FileChannel(file), 1, CPU)
    check_record(ring.take(0), 0)
    ring.give_back()
    with pytest.raises(GraphoptError, match="ends within layer 1: it was cut"):
        ring.take(1)


def test_a_throttled_reader_takes_its_time(tmp_path: Path) -> None:
    blocks = [block(i, 20000) for i in range(2)]
    file = write_layers(tmp_path, blocks, is_temporary=False)
    nbytes = file.records[0].nbytes
    ring = LayerRing(FileChannel(file, bytes_per_s=nbytes / 0.05), 1, CPU)
    begin = time.perf_counter()
    for record in (0, 1, 0, 1):
        ring.take(record)
        ring.give_back()
    assert time.perf_counter() - begin >= 4 * 0.05 - 0.006  # and what it may catch up


def test_closing_ends_the_thread_and_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    gc.collect()
    before = threading.active_count()
    file = write_layers(folder, [block(0)], is_temporary=True)
    ring = LayerRing(FileChannel(file, bytes_per_s=1000.0), 1, CPU)  # minutes for a layer
    assert threading.active_count() == before + 1
    ring.close()
    assert threading.active_count() == before and not folder.exists()
    with pytest.raises(GraphoptError, match="closed"):
        ring.take(0)
    with pytest.raises(GraphoptError, match="closed"):
        ring.tensors(0)
    ring.close()


def test_a_ring_that_is_gone_is_closed(tmp_path: Path) -> None:
    gc.collect()
    folder, before = tmp_path / "own", threading.active_count()
    file = write_layers(folder, [block(0)], is_temporary=True)
    ring = LayerRing(FileChannel(file), 1, CPU)
    ring.take(0)
    del ring
    gc.collect()
    assert threading.active_count() == before and not folder.exists()


def test_reads_are_measured(tmp_path: Path) -> None:
    file = write_layers(tmp_path, [block(0, 100000)], is_temporary=False)
    line = measured_read(file)
    assert line.alpha_s >= 0 and line.beta_s >= 0
    assert 0 < line.seconds(file.records[0].nbytes) < 5
