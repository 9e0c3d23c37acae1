"""The two models of Wan2.2 as one: each noise level has its model, wherever the other one waits."""

import gc
import weakref
from functools import partial

import pytest
import torch

from tests import tiny
from tests.diffusers_dit import diffusers_dit, padded
from utils.errors import UserError
from utils.options import parse_options
from utils.safetensors_io import save_file_atomically
from wan.block_swap import SwapOptions
from wan.configs import TASKS
from wan.dit_file import check_dit, dit_shape
from wan.loading import build_dit, load_dit
from wan.pair import PairOptions, check_pair, exchange, fetch, load_pair, park, task_config, twin
from wan.streaming import CpuDevice

CONFIG = TASKS["t2v-A14B"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two tiny models with other weights each: for low and for high noise."""
    folder = tmp_path_factory.mktemp("pair")
    paths = []
    for number, name in enumerate(("low", "high")):
        paths.append(folder / f"{name}.safetensors")
        save_file_atomically(tiny.state_dict("dit_t2v", seed=number), paths[-1], {"num_heads": "3"})
    return paths


def alone(path, **how):
    return load_dit(path, CONFIG, torch.float32, CPU, **how)


def paired(files, swap=None, lazy=False, offload=False, **how):
    swap = swap or SwapOptions()
    options = PairOptions(dit_high_noise=files[1], offload_inactive_dit=offload)

    def load(path, option):
        return load_dit(path, CONFIG, torch.float32, CPU, swap=swap, option=option, **how)

    return load_pair(load, files[0], options, CONFIG, CPU, swap, lazy)


def seen(batch=1):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batch, 16, 2, 4, 6, generator=generator)
    return x, [torch.randn(n + 3, 64, generator=generator) for n in range(batch)]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"offload": True},
        {"lazy": True},
        {"offload": True, "fp8": True, "fp8_scaled": True},
        {"offload": True, "swap": SwapOptions(1)},
        {"offload": True, "swap": SwapOptions(2, block_swap_ring_size=1)},
        {"offload": True, "swap": SwapOptions(2, weights_on_disk=True)},
        {"swap": SwapOptions(1)},
        {"lazy": True, "swap": SwapOptions(2)},
        {"swap": SwapOptions("auto")},
    ],
)
@pytest.mark.parametrize("gradients", [False, True])
def test_each_level_has_the_velocity_of_its_model_to_the_bit(files, how, gradients):
    """Back and forth, so that each model has been away and come back."""
    fp8 = {name: value for name, value in how.items() if name.startswith("fp8")}
    models = {high: alone(files[high], **fp8) for high in (False, True)}
    pair, (x, text) = paired(files, **how), seen()
    with torch.set_grad_enabled(gradients):
        for timestep in (999.0, 875.0, 874.9, 20.0, 900.0, 1.0):
            told = torch.tensor([timestep])
            assert torch.equal(pair(x, told, text), models[timestep >= 875](x, told, text)), timestep


def test_a_context_is_that_of_the_model_in_use(files):
    pair, (x, text) = paired(files, offload=True), seen()
    with torch.inference_mode():
        context = pair.context(text, None, reused=True)
        for timestep in (900.0, 880.0, 100.0, 900.0):
            told = torch.tensor([timestep])
            for each in (context, twin(context)):
                model, passes = pair.chosen(timestep, {"conditional": {"text": each}})
                (found,) = model.velocities(x, told, list(passes.values()))
                assert torch.equal(found, alone(files[timestep >= 875])(x, told, text))


def test_samples_on_both_sides_go_to_their_models(files):
    pair, (x, text) = paired(files), seen(4)
    told = torch.tensor([100.0, 950.0, 875.0, 874.0])
    with torch.no_grad():
        found = pair(x, told, text, frame_indices=[[0, n + 1] for n in range(4)])
        for row, timestep in enumerate(told.tolist()):
            one = [slice(row, row + 1)] * 2
            want = alone(files[timestep >= 875])(
                x[one[0]], told[one[1]], text[row : row + 1], frame_indices=[[0, row + 1]]
            )
            torch.testing.assert_close(found[one[0]], want, rtol=0, atol=1e-5)


def test_only_one_of_two_lazily_loaded_models_is_ever_in_memory(files):
    pair, (x, text) = paired(files, lazy=True), seen()
    changed = []
    pair.prepare(lambda model: changed.append(weakref.ref(model)))
    assert pair.models == []
    with torch.no_grad():
        context = pair.context(text, None, reused=True)
        for timestep in (999.0, 900.0, 100.0):
            model, passes = pair.chosen(timestep, {"conditional": {"text": context}})
            model.velocities(x, torch.tensor([timestep]), list(passes.values()))
            del model, passes
    gc.collect()
    assert [model() is None for model in changed] == [True, False]


def test_the_idle_model_takes_no_place_on_the_device_but_that_of_a_tensor(files):
    """A device whose bytes are counted: what is there at the most is one model and its largest tensor."""

    class Counting(CpuDevice):
        homes = 0

        def home(self, size):
            self.homes += size
            return super().home(size)

    device, (low, high) = Counting(), map(alone, files)
    size = sum(tensor.nbytes for tensor in low.parameters())
    park(low, device)
    assert device.homes == size
    places = {tensor.data_ptr() for tensor in high.parameters()}
    homes = {tensor.data_ptr() for tensor in low.parameters()}
    exchange(low, high, device)
    assert device.homes == size, "no memory besides that which they had"
    assert {tensor.data_ptr() for tensor in low.parameters()} == places
    assert {tensor.data_ptr() for tensor in high.parameters()} == homes


def test_models_of_other_formats_change_places_too(files):
    low, high = alone(files[0]), alone(files[1], fp8=True, fp8_scaled=True)
    want = {
        name: tensor.clone()
        for model in (low, high)
        for name, tensor in model.state_dict(prefix=str(id(model))).items()
    }
    device = CpuDevice()
    park(low, device)
    for coming, going in ((low, high), (high, low)):
        exchange(coming, going, device)
    fetch(low, device)
    for model in (low, high):
        for name, tensor in model.state_dict(prefix=str(id(model))).items():
            assert tensor.dtype == want[name].dtype and torch.equal(tensor.float(), want[name].float())


def test_auto_keeps_the_idle_model_in_main_memory(files, caplog):
    caplog.set_level("INFO")
    assert paired(files, SwapOptions("auto")).offload and "waits in main memory" in caplog.text
    assert paired(files, SwapOptions("auto")).auto_swap is not None
    assert paired(files).auto_swap is None


# ------------------------------------------------------------------------------------------------------------ checks
@pytest.mark.parametrize(("word", "level"), [("0.875", 0.875), ("875", 0.875), ("900", 0.9), ("0.9", 0.9)])
def test_a_boundary_is_a_level_or_in_thousandths(word, level):
    (options,) = parse_options("doc", PairOptions, argv=["--timestep_boundary", word])
    assert task_config("t2v-A14B", options).boundary == level


@pytest.mark.parametrize("word", ["0", "1", "1000", "-3", "half"])
def test_a_boundary_that_is_no_level_is_refused(word):
    with pytest.raises(UserError, match="--timestep_boundary"):
        parse_options("doc", PairOptions, argv=[f"--timestep_boundary={word}"])


def test_tasks_of_one_model_take_no_second(files):
    for given in ({"dit_high_noise": files[1]}, {"timestep_boundary": 0.9}, {"offload_inactive_dit": True}):
        with pytest.raises(UserError, match=r"t2v-14B has one model.*Use --task t2v-A14B or i2v-A14B") as error:
            task_config("t2v-14B", PairOptions(**given))
        assert error.value.problem.startswith(f"--{next(iter(given))}: ")
    assert task_config("t2v-14B", PairOptions()) is TASKS["t2v-14B"]


def test_files_that_do_not_go_together_are_refused(files, tmp_path, caplog):
    shape = check_dit(files[0], CONFIG)
    check = partial(check_pair, low=files[0], shape=shape, config=CONFIG, fp8=False, fp8_scaled=False)
    check(PairOptions())
    check(PairOptions(files[1]))
    check(PairOptions(files[0]))
    assert "is the same file as --dit" in caplog.text
    others = {
        "small": (tiny.state_dict("dit_t2v", blocks=1), "of another size"),
        "i2v": (tiny.state_dict("dit_i2v_a14b"), "but --task is t2v-A14B"),
    }
    for name, (tensors, line) in others.items():
        save_file_atomically(tensors, tmp_path / f"{name}.safetensors", {"num_heads": "3"})
        with pytest.raises(UserError, match=line) as error:
            check(PairOptions(tmp_path / f"{name}.safetensors"))
        assert error.value.problem.startswith("--dit_high_noise ")
    with pytest.raises(UserError, match="--dit_high_noise"):
        check(PairOptions(tmp_path / "nowhere.safetensors"))
    for dtype, name in ((torch.float16, "half"), (torch.bfloat16, "brain")):
        tensors = {key: tensor.to(dtype) for key, tensor in tiny.state_dict("dit_t2v").items()}
        save_file_atomically(tensors, tmp_path / f"{name}.safetensors", {"num_heads": "3"})
    with pytest.raises(UserError, match="one of the two files is in fp16, the other in bf16"):
        check(PairOptions(tmp_path / "half.safetensors"), low=tmp_path / "brain.safetensors")


def test_one_embedding_for_a_video_equals_one_for_each_token():
    """What --force_v2_1_time_embedding asks for, against diffusers' model with the timestep of every token."""
    weights = tiny.state_dict("dit_t2v")
    ours, (x, text) = build_dit(weights, heads=3), seen(2)
    theirs = diffusers_dit(weights, dit_shape(weights, 3))
    told = torch.tensor([40.0, 900.0])
    per_token = told[:, None].expand(2, 2 * 2 * 3)
    with torch.no_grad():
        want = theirs(x, per_token, padded(text), return_dict=False)[0]
        torch.testing.assert_close(ours(x, told, text), want, rtol=0, atol=2e-5)
