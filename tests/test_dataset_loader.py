import json
import os
import pickle
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dataset.cache import write_latents, write_text
from dataset.config import ImageConfig, load_config
from dataset.items import DatasetItem, Source
from dataset.loader import Batch, CachedDataset, batches_of, find_cached, make_loader
from utils.errors import UserError


def cached(
    folder: Path, count: int, shape: tuple[int, ...] = (16, 1, 8, 8), prefix: str = "a", extra: tuple[str, ...] = ()
) -> None:
    """Write caches of `count` pictures whose latents hold their own number."""
    config = ImageConfig(where="test", cache_directory=folder)
    for i in range(count):
        source = Source(Path(f"{prefix}{i:02d}.png"), f"caption {i}", False)
        tensors = {"latents": torch.full(shape, float(i))}
        tensors |= {name: torch.zeros(20, *shape[1:]) for name in extra}
        write_latents(config, DatasetItem(source, 64, 64, 64, 64), tensors, torch.float32)
        write_text(config, source, torch.full((i + 1, 4), float(i)))


def dataset(folder: Path, seed: int = 7, buckets: int | None = None, **keys: object) -> CachedDataset:
    return CachedDataset([ImageConfig(where="test", cache_directory=folder, **keys)], seed, buckets)


def numbers(data: CachedDataset, epoch: int = 0) -> list[list[float]]:
    """Return the items of each batch of an epoch, in order."""
    data.set_epoch(epoch)
    return [batch.latents[:, 0, 0, 0, 0].tolist() for batch in make_loader(data)]


def test_recorded_caches_give_the_recorded_items_buckets_and_batches(golden: Path, tmp_path: Path):
    shutil.copytree(golden / "cache", tmp_path / "cache")
    plan = json.loads((golden / "cache_index.json").read_text())["plans"]["t2v"]["toml"]
    (tmp_path / "data.toml").write_text(plan.replace("<GOLDEN>", tmp_path.as_posix()))
    configs = load_config(tmp_path / "data.toml")
    recorded = json.loads((golden / "batches.json").read_text())
    for config, want in zip(configs, recorded["datasets"], strict=True):
        items, _ = find_cached(config)
        sizes = Counter()
        for item in items:
            frames, height, width = dict(item.shapes)["latents"][1:]
            # Of pictures the recorded key has a constant in place of the frames.
            sizes[8 * width, 8 * height, 9 if config.kind == "image" else 4 * frames - 3] += 1
        assert (len(items), sorted(sizes.items())) == (want["items"], [(tuple(b), n) for b, n in want["buckets"]])
        assert len(CachedDataset([config], seed=0)) == want["batches"]
    everything = CachedDataset(configs, seed=0)
    assert len(everything) == sum(want["batches"] for want in recorded["datasets"])
    shapes = {tuple(batch.latents.shape): [tuple(t.shape) for t in batch.text] for batch in make_loader(everything)}
    first = recorded["first_batch"]
    assert shapes[tuple(first["latents"])] == [tuple(shape) for shape in first["t5"]]


def test_an_epoch_holds_every_item_as_often_as_it_is_to_be_repeated(tmp_path: Path):
    cached(tmp_path, 5)
    batches = numbers(dataset(tmp_path, batch_size=2, num_repeats=3))
    assert sorted(map(len, batches)) == [1] + [2] * 7
    assert Counter(sum(batches, [])) == dict.fromkeys([0.0, 1.0, 2.0, 3.0, 4.0], 3)


def test_the_order_follows_from_seed_and_epoch_alone(tmp_path: Path):
    cached(tmp_path, 12)
    first = numbers(dataset(tmp_path, batch_size=3))
    assert numbers(dataset(tmp_path, batch_size=3)) == first
    again = dataset(tmp_path, batch_size=3)
    assert numbers(again, epoch=1) != first
    assert numbers(again, epoch=0) == first
    assert numbers(dataset(tmp_path, batch_size=3, seed=8)) != first


def test_workers_give_the_same_batches_also_in_later_epochs(tmp_path: Path):
    cached(tmp_path, 8)
    data = dataset(tmp_path, batch_size=2)
    loader = make_loader(data, workers=2, persistent_workers=True)
    for epoch in range(2):
        data.set_epoch(epoch)
        got = [batch.latents[:, 0, 0, 0, 0].tolist() for batch in loader]
        assert got == numbers(dataset(tmp_path, batch_size=2), epoch)


def test_the_loader_leaves_the_global_random_numbers_alone(tmp_path: Path):
    cached(tmp_path, 3)
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    list(make_loader(dataset(tmp_path)))
    assert torch.equal(torch.rand(3), want)


def test_accelerate_reaches_the_epoch_through_its_own_loader(tmp_path: Path):
    from accelerate import Accelerator

    cached(tmp_path, 8)
    loader = Accelerator(cpu=True).prepare(make_loader(dataset(tmp_path, batch_size=2)))
    for epoch in (3, 1):
        loader.set_epoch(epoch)
        got = [batch.latents[:, 0, 0, 0, 0].tolist() for batch in loader]
        assert got == numbers(dataset(tmp_path, batch_size=2), epoch)


def test_shapes_and_kinds_of_caches_are_never_mixed(tmp_path: Path):
    cached(tmp_path, 3)
    cached(tmp_path, 3, shape=(16, 1, 4, 8), prefix="b")
    cached(tmp_path, 3, prefix="c", extra=("latents_image",))
    batches = list(make_loader(dataset(tmp_path, batch_size=4)))
    assert sorted((tuple(batch.latents.shape), batch.latents_image is not None) for batch in batches) == [
        ((3, 16, 1, 4, 8), False),
        ((3, 16, 1, 8, 8), False),
        ((3, 16, 1, 8, 8), True),
    ]
    summary = dataset(tmp_path, batch_size=4).summary()
    assert summary.names == {"latents"} and summary.items == 9 and summary.batches == 3
    assert dict(summary.buckets) == {"64x64, 1 frame": 6, "64x32, 1 frame": 3}


def test_each_item_comes_with_its_own_text(tmp_path: Path):
    cached(tmp_path, 6)
    for batch in make_loader(dataset(tmp_path, batch_size=4)):
        for latents, text in zip(batch.latents, batch.text, strict=True):
            number = latents[0, 0, 0, 0]
            assert text.shape == (int(number) + 1, 4) and (text == number).all()


def test_one_frame_caches_give_frame_indices_and_one_clip_image_without_its_dimension(golden: Path, tmp_path: Path):
    for name, clip_shape, indices in (
        ("one_frame", (1, 257, 64), [0, 9]),
        ("one_frame_two", (1, 2, 257, 64), [0, 5, 10]),
    ):
        folder = tmp_path / name
        shutil.copytree(golden / "cache" / name, folder)
        write_text(ImageConfig(where="", cache_directory=folder), Source(Path("a.png"), "x", False), torch.ones(2, 64))
        (batch,) = make_loader(dataset(folder))
        assert tuple(batch.clip.shape) == clip_shape and batch.frame_indices.tolist() == [indices]
        assert batch.latents_image.shape[1] == 20 and len(batch) == 1


def test_stratified_timesteps_fill_every_interval_over_an_epoch(tmp_path: Path):
    cached(tmp_path, 10)
    batches = list(make_loader(dataset(tmp_path, batch_size=2, num_repeats=4, buckets=10)))
    assert all(len(batch.timesteps) == len(batch) for batch in batches)
    filled = Counter(int(10 * t) for batch in batches for t in batch.timesteps)
    assert filled == dict.fromkeys(range(10), 4)
    assert all(batch.timesteps is None for batch in make_loader(dataset(tmp_path, buckets=1)))


def test_damaged_and_foreign_files_are_left_out_named_and_not_touched(tmp_path: Path, caplog):
    cached(tmp_path, 4)
    cut = tmp_path / "a01_0064x0064_wan.safetensors"
    cut.write_bytes(cut.read_bytes()[:-3])
    text = tmp_path / "a02_wan_te.safetensors"
    text.write_bytes(b"")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    data = dataset(tmp_path)
    assert sorted(sum(numbers(data), [])) == [0.0, 3.0]
    assert str(cut) in caplog.text and str(text) in caplog.text
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_latents_without_text_are_left_out_and_known(tmp_path: Path):
    cached(tmp_path, 4)
    for name in ("a00", "a03"):
        (tmp_path / f"{name}_wan_te.safetensors").unlink()
    data = dataset(tmp_path)
    assert len(data) == 2
    assert [path.name for path in data.without_text] == [f"a0{i}_0064x0064_wan.safetensors" for i in (0, 3)]


def test_empty_caches_are_an_error_that_says_what_to_run(tmp_path: Path):
    with pytest.raises(UserError) as error:
        dataset(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(error.value) and "wan_cache_latents.py" in str(error.value)


def test_a_batch_can_be_pickled_and_moved():
    batch = Batch(torch.ones(2, 16, 1, 4, 4), [torch.ones(3, 8), torch.ones(5, 8)], timesteps=[0.1, 0.2])
    moved = pickle.loads(pickle.dumps(batch)).to("meta", non_blocking=True)
    assert moved.latents.is_meta and all(text.is_meta for text in moved.text) and moved.timesteps == [0.1, 0.2]
    assert not batch.latents.is_meta and replace(batch, clip=None).clip is None


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cache_file_that_is_damaged_while_training_goes_on_is_named_in_one_line(tmp_path, workers):
    cached(tmp_path, 2)
    data = dataset(tmp_path)
    (damaged,) = tmp_path.glob("a01_*_wan.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-8])
    with pytest.raises(UserError) as error:
        list(batches_of(make_loader(data, workers)))
    assert str(error.value).startswith(f"cache file {damaged}: the file is truncated or damaged")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no way to send Ctrl-C to one process")
def test_workers_leave_ctrl_c_to_the_process_that_trains(tmp_path):
    cached(tmp_path, 6)
    batches = iter(batches_of(make_loader(dataset(tmp_path), workers=1)))
    next(batches)
    for worker in torch.multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)
    assert len(list(batches)) == 5
