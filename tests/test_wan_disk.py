"""Swapped blocks that are read from the disk: the same bits, from which file, and what happens when it goes."""

import errno
import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.test_wan_auto_swap import automatic
from tests.test_wan_block_swap import BLOCKS, WEIGHTS, detach_branches, guided_inputs
from tests.test_wan_model import random_inputs, trained_gradients
from utils.errors import UserError
from utils.safetensors_io import save_file_atomically
from wan.block_swap import SwapOptions, check_swap, stream_blocks
from wan.configs import TASKS
from wan.disk import Disk, DiskHome, stand_in
from wan.loading import load_dit
from wan.model import WanModel
from wan.streaming import CpuDevice


class InPieces(CpuDevice):
    """A device that receives a few bytes at a time, not in step with tensors, into what was garbage before."""

    def receive(self, slot: Tensor, fill, mark) -> None:
        slot.fill_(255)
        for start in range(0, len(slot), 1001):
            buffer = torch.empty(min(1001, len(slot) - start), dtype=torch.uint8)
            fill(buffer, start)
            slot[start : start + len(buffer)] = buffer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of the same random DiT: whole, in two parts, in bfloat16."""
    folder = tmp_path_factory.mktemp("dit")
    weights = tiny.state_dict("dit_t2v", blocks=BLOCKS)
    paths = {
        "whole": folder / "dit.safetensors",
        "parts": folder / "dit-00001-of-00002.safetensors",
        "bfloat16": folder / "bfloat16.safetensors",
    }
    names = sorted(weights)
    halves = names[::2], names[1::2]
    for number, half in enumerate(halves, 1):
        path = folder / f"dit-0000{number}-of-00002.safetensors"
        save_file_atomically({name: weights[name] for name in half}, path, {"num_heads": "3"})
    save_file_atomically(weights, paths["whole"], {"num_heads": "3"})
    halved = {name: tensor.bfloat16() for name, tensor in weights.items()}
    save_file_atomically(halved, paths["bfloat16"], {"num_heads": "3"})
    return paths


def load(path, swapped: int = 0, slots: int | None = None, weights: str = "float32", **options) -> WanModel:
    swap = SwapOptions(swapped, slots, weights_on_disk=swapped > 0)
    return load_dit(path, TASKS["t2v-14B"], torch.float32, "cpu", swap=swap, **WEIGHTS[weights], **options)


def ring_of(model: WanModel):
    return model.blocks[0].forward.func.__self__


def deltas():
    generator = torch.Generator().manual_seed(5)
    return {"blocks.1.ffn.0.weight": lambda: torch.randn(192, 96, generator=generator.manual_seed(5))}


CASES = [("whole", "float32", {}), ("parts", "float32", {}), ("bfloat16", "float32", {})]
CASES += [("whole", "fp8", {}), ("parts", "fp8_scaled", {}), ("whole", "nf4", {})]
CASES += [("whole", "float32", {"deltas": deltas()})]


# ---------------------------------------------------------------------------------------------------- the same bits
@pytest.mark.parametrize(("file", "weights", "more"), CASES)
def test_velocities_and_gradients_are_the_same_bits_from_the_disk(files, file, weights, more, monkeypatch):
    monkeypatch.setattr("wan.loading.streaming_device", lambda *_: InPieces(True))
    plain = load(files[file], weights=weights, **more)
    inputs, given = guided_inputs(plain), random_inputs(plain, batch=2)
    with torch.inference_mode():
        want = plain.velocities(*inputs)
    loss, gradients = trained_gradients(plain, given)
    for swapped, slots in ((1, 1), (3, 2), (4, 2)):
        model = load(files[file], swapped, slots, weights, **more)
        with torch.inference_mode():
            for _ in range(2):
                assert all(torch.equal(a, b) for a, b in zip(model.velocities(*inputs), want, strict=True))
        for _ in range(2):
            same_loss, same = trained_gradients(model, given)
            detach_branches(model)
            assert torch.equal(loss, same_loss)
            assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))


@torch.no_grad()
def test_blocks_that_run_out_of_memory_go_to_the_disk_too(files):
    model, plain = load(files["whole"], 3), load(files["whole"])
    ring = ring_of(model)
    inputs = guided_inputs(plain)
    model.velocities(*inputs)
    assert ring.disk.bytes_written == 0
    ring.stream(range(BLOCKS), 2)
    assert 0 < ring.disk.bytes_written <= ring.block_bytes
    for a, b in zip(model.velocities(*inputs), plain.velocities(*inputs), strict=True):
        assert torch.equal(a, b)
    assert automatic(load(files["whole"]), CpuDevice()).ring.disk is None


# --------------------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize(
    ("file", "weights", "more", "written"),
    [
        ("whole", "float32", {}, 0),
        ("parts", "float32", {}, 0),
        ("bfloat16", "float32", {}, 1),
        ("whole", "float32", {"deltas": deltas()}, 192 * 96 * 4),
    ],
)
def test_only_what_no_file_holds_as_it_is_needed_is_written_and_once(files, file, weights, more, written):
    model = load(files[file], BLOCKS, 2, weights, **more)
    disk, ring = ring_of(model).disk, ring_of(model)
    every = sum(tensor.nbytes for tensors in ring.tensors for tensor in tensors)
    assert disk.bytes_written == (every if written == 1 else written)
    with torch.no_grad():
        for _ in range(3):
            model(**random_inputs(model))
    assert disk.bytes_written == (every if written == 1 else written)
    disk.start(lambda: None).result()  # after what is still being read ahead
    assert disk.bytes_read == ring.loads * every // BLOCKS > 0


def test_main_memory_does_not_grow_with_the_blocks_and_what_is_absent_reads_as_nan(tmp_path):
    taken = []
    for blocks in (3, 9):
        path = tmp_path / f"{blocks}.safetensors"
        save_file_atomically(tiny.state_dict("dit_t2v", blocks=blocks), path, {"num_heads": "3"})
        model = load(path, blocks)
        with torch.no_grad():
            model(**random_inputs(model))
        ring = ring_of(model)
        tensors = [*model.state_dict().values(), *(slot.data for slot in ring.slots)]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        taken.append(sum(storages.values()))
        assert model.blocks[0].ffn[0].weight.isnan().all() and model.blocks[0].ffn[0].weight.shape == (192, 96)
    assert taken[1] - taken[0] < 6 * 100 * 4 < ring.block_bytes


def test_the_thread_ends_and_the_files_are_closed_with_the_model(files):
    before = set(threading.enumerate())
    model = load(files["bfloat16"], BLOCKS)
    with torch.no_grad():
        model(**random_inputs(model))
    (thread,) = set(threading.enumerate()) - before
    opened, gone = list(ring_of(model).disk._files.values()), weakref.ref(model)
    assert opened and not any(file.closed for file in opened) and thread.daemon
    del model
    gc.collect()
    assert gone() is None
    thread.join(timeout=10)
    assert not thread.is_alive() and all(file.closed for file in opened)


def test_nothing_is_left_behind(files):
    before = sorted(files["whole"].parent.iterdir())
    model = load(files["whole"], BLOCKS, weights="fp8")
    assert ring_of(model).disk.bytes_written > 0
    assert sorted(files["whole"].parent.iterdir()) == before


# --------------------------------------------------------------------------------------------------------- errors
@torch.no_grad()
def test_a_file_that_shrinks_while_it_is_used_is_one_line_and_no_hang(files, tmp_path):
    path = tmp_path / "dit.safetensors"
    path.write_bytes(files["whole"].read_bytes())
    model = load(path, BLOCKS)
    model(**random_inputs(model))
    with open(path, "r+b") as file:
        file.truncate(5000)
    with pytest.raises(UserError, match=r"--weights_on_disk: .*dit.safetensors cannot be read any more \(the file has"):
        for _ in range(2):
            model(**random_inputs(model))


def test_an_error_in_the_backward_pass_is_the_same_line(files, tmp_path):
    path = tmp_path / "dit.safetensors"
    path.write_bytes(files["whole"].read_bytes())
    model = load(path, BLOCKS, 1)
    out = model(**{**random_inputs(model), "x": random_inputs(model)["x"].requires_grad_()})
    with open(path, "r+b") as file:
        file.truncate(5000)
    with pytest.raises(UserError, match="cannot be read any more"):
        out.sum().backward()


def test_a_full_disk_is_one_line_that_names_the_option(files, monkeypatch):
    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(UserError, match="takes no more weights .No space left.*--weights_on_disk_dir"):
        load(files["whole"], BLOCKS, weights="fp8")


def test_converted_weights_go_to_the_folder_that_is_named(files, tmp_path, monkeypatch):
    import tempfile

    folders, make = [], tempfile.TemporaryFile
    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir, **how: folders.append(dir) or make(dir=dir, **how))
    for folder in (None, tmp_path):
        swap = SwapOptions(2, weights_on_disk=True, weights_on_disk_dir=folder)
        load_dit(files["whole"], TASKS["t2v-14B"], torch.float32, "cpu", fp8=True, swap=swap)
    assert folders == [files["whole"].parent, tmp_path]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"weights_on_disk": True}, "--weights_on_disk: is for blocks that are swapped. Add --blocks_to_swap auto."),
        ({"weights_on_disk_dir": "x"}, "--weights_on_disk_dir x: is for --weights_on_disk. Add that, or leave"),
        ({"blocks_to_swap": "auto", "block_swap_ring_size": 5}, "5: is more than the DiT's 4 blocks"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, line):
    with pytest.raises(UserError) as error:
        check_swap(SwapOptions(**options), 4)
    assert line in str(error.value)


# ---------------------------------------------------------------------------------------------------------- pieces
def test_any_part_of_a_packed_block_can_be_asked_for(tmp_path):
    tensors = [torch.randn(7, 9), torch.randn(300).bfloat16(), torch.randn(3).to(torch.float8_e4m3fn), torch.ones(())]
    values = [tensor.clone() for tensor in tensors]
    disk = Disk(tmp_path)
    home = DiskHome(disk, ["a", "b", "c", "d"], tensors, CpuDevice())
    whole = torch.zeros(2000, dtype=torch.uint8)
    home.fill(whole, 0)
    for start, value in zip(home.starts, values, strict=True):
        assert torch.equal(whole[start : start + value.nbytes], value.flatten().view(torch.uint8))
    for start, length in ((0, 1), (251, 10), (200, 700), (1000, 400)):
        part = torch.zeros(length, dtype=torch.uint8)
        home.fill(part, start)
        assert torch.equal(part, whole[start : start + length])
    assert all(stand_in(value.dtype, value.shape).float().isnan().all() for value in values)


@pytest.mark.gpu
@pytest.mark.parametrize("weights", WEIGHTS)
def test_on_a_gpu_blocks_from_the_disk_give_the_same_bits(files, weights, monkeypatch):
    monkeypatch.setattr("wan.streaming._STAGED", 1000)
    plain = load_dit(files["whole"], TASKS["t2v-14B"], torch.float32, "cuda", **WEIGHTS[weights])
    given = random_inputs(plain)
    given["x"] = given["x"].cuda()
    swap = SwapOptions(BLOCKS, 2, weights_on_disk=True)
    model = load_dit(files["whole"], TASKS["t2v-14B"], torch.float32, "cuda", swap=swap, **WEIGHTS[weights])
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(model(**given), plain(**given))
    assert stream_blocks(plain, [0], 1, CpuDevice()).block_bytes == ring_of(model).block_bytes
