"""Block swap on doubles of the device: the same bits as without it, and how many bytes travel when."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from tests.test_wan_model import model_of, random_inputs, trained_gradients
from utils.errors import UserError
from utils.safetensors_io import save_file_atomically
from wan.block_swap import Ring, SwapOptions, check_swap, stream_blocks, streamed_blocks
from wan.checkpointing import save_memory
from wan.configs import TASKS
from wan.fp8 import takes_row_scales
from wan.loading import load_dit
from wan.model import WanModel
from wan.streaming import CpuDevice, CudaDevice

BLOCKS = 4
EVERY_WAY = [(swapped, slots) for swapped in range(1, BLOCKS + 1) for slots in range(1, swapped + 1)]
WEIGHTS = {
    "float32": {},
    "fp8": {"fp8": True},
    "fp8_scaled": {"fp8": True, "fp8_scaled": True},
    "fp8_fast": {"fp8": True, "fp8_scaled": True, "fp8_fast": True},
    "int8": {"quantize": "int8"},
    "nf4": {"quantize": "nf4"},
}


class Counting(CpuDevice):
    """The CPU, which copies as early as a GPU could, and what it has been asked for."""

    def __init__(self):
        self.homes: list[int] = []  # addresses by rank
        self.order: list[int] = []  # ranks as they were copied
        self.bytes_on_device = self.bytes_copied = 0

    def home(self, size: int) -> Tensor:
        home = super().home(size)
        self.homes.append(home.data_ptr())
        return home

    def slot(self, size: int) -> Tensor:
        self.bytes_on_device += size
        return super().slot(size).fill_(255)

    def copy(self, slot: Tensor, home: Tensor):
        self.order.append(self.homes.index(home.data_ptr()))
        self.bytes_copied += home.nbytes
        return super().copy(slot, home)


class Late(Counting):
    """The slowest GPU: what is being copied is not a number until somebody waits for it, or for a later copy."""

    def __init__(self):
        super().__init__()
        self.begun: list[tuple[Tensor, Tensor]] = []
        self.done = 0

    def copy(self, slot: Tensor, home: Tensor) -> int:
        super().copy(slot, home)
        slot.fill_(255)  # NaN in float32, bfloat16 and float8 alike
        self.begun.append((slot, home))
        return len(self.begun)

    def wait(self, copy: int) -> None:
        for slot, home in self.begun[self.done : copy]:
            slot.copy_(home)
        self.done = max(self.done, copy)


HOW = [("float32", Counting), *((held, Late) for held in ("float32", "fp8", "fp8_scaled", "nf4"))]


def swapped_blocks(model: WanModel, swapped: int, slots: int, device: CpuDevice) -> Ring:
    return stream_blocks(model, streamed_blocks(len(model.blocks), swapped), slots, device)


def guided_inputs(model: WanModel, **sizes) -> tuple[Tensor, Tensor, list[dict]]:
    """Return noisy latents, a timestep, and the conditions of a conditional, an unconditional and a skipping pass."""
    given = random_inputs(model, **sizes)
    x, timestep = given.pop("x"), given.pop("timestep")
    passes = [{**given, "text": random_inputs(model, rows=(rows,))["text"]} for rows in (9, 70)]
    return x, timestep, [*passes, {**passes[1], "skip_blocks": (0, 2)}]


def detach_branches(model: WanModel) -> None:
    """Undo what trained_gradients() attaches to linear layers."""
    for layer in model.blocks.modules():
        if isinstance(layer, nn.Linear):
            del layer.forward


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Load the same random DiT of four blocks, its weights held in one of the ways of WEIGHTS."""
    path = tmp_path_factory.mktemp("dit") / "dit.safetensors"
    save_file_atomically(tiny.state_dict("dit_t2v", blocks=BLOCKS), path, {"num_heads": "3"})

    def load(weights: str = "float32", checkpointing: bool = False, device: str = "cpu", **options) -> WanModel:
        model = load_dit(path, TASKS["t2v-14B"], torch.float32, device, **WEIGHTS[weights], **options)
        save_memory(model, checkpointing)
        return model

    return load


# ---------------------------------------------------------------------------------------------------- the same bits
@pytest.mark.parametrize(("weights", "device"), HOW)
@torch.inference_mode()
def test_the_velocity_is_the_same_bits_however_many_blocks_are_swapped(load, weights, device):
    model = load(weights)
    given = [random_inputs(model, seed=seed) for seed in range(3)]
    want = [model(**inputs) for inputs in given]
    for swapped, slots in EVERY_WAY:
        with torch.inference_mode(False):
            model = load(weights)
            swapped_blocks(model, swapped, slots, device())
        for inputs, velocity in zip(given, want, strict=True):
            assert torch.equal(model(**inputs), velocity), (swapped, slots)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("weights", "device"), HOW)
def test_gradients_are_the_same_bits_however_many_blocks_are_swapped(load, weights, checkpointing, device):
    model = load(weights, checkpointing)
    given = random_inputs(model, batch=2)
    loss, gradients = trained_gradients(model, given)
    for swapped, slots in EVERY_WAY:
        model = load(weights, checkpointing)
        swapped_blocks(model, swapped, slots, device())
        for _ in range(2):  # the second step begins with what the first has left in the ring
            same_loss, same = trained_gradients(model, given)
            detach_branches(model)
            assert torch.equal(loss, same_loss), (swapped, slots)
            assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True)), (swapped, slots)


def test_sampling_between_steps_and_steps_without_a_backward_pass_disturb_nothing(load):
    model, plain = load(), load()
    device = Late()
    swapped_blocks(model, BLOCKS, 2, device)
    given = random_inputs(plain, batch=2)
    with torch.inference_mode():
        want = plain(**given)
    loss, gradients = trained_gradients(plain, given)
    detach_branches(plain)
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(model(**given), want)
            assert torch.equal(model(**given, skip_blocks=(1, 3)), plain(**given, skip_blocks=(1, 3)))
        model(**{**given, "x": given["x"].clone().requires_grad_()})  # its backward pass never comes
        same_loss, same = trained_gradients(model, given)
        detach_branches(model)
        assert torch.equal(loss, same_loss) and all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))


def test_tensors_keep_their_names_and_values_and_belong_to_main_memory_once_the_ring_has_moved_on(load):
    model, plain = load("fp8_scaled"), load("fp8_scaled")
    ring = swapped_blocks(model, 3, 2, Late())
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    with torch.inference_mode():
        model(**random_inputs(model))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8)) for name in before)
    slots = {slot.data.data_ptr() for slot in ring.slots}
    visiting = [name for name, tensor in after.items() if tensor.untyped_storage().data_ptr() in slots]
    assert {name.split(".")[1] for name in visiting} == {"3"}


def test_a_model_goes_when_nobody_needs_it_even_if_a_backward_pass_never_came(load):
    model = load()
    ring = swapped_blocks(model, 3, 2, Counting())
    model(**{**random_inputs(model), "x": random_inputs(model)["x"].requires_grad_()})
    gone = weakref.ref(model), weakref.ref(ring)
    del model, ring
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


# ------------------------------------------------------------------------------------------------------ the schedule
def test_swapped_blocks_are_spread_evenly():
    assert streamed_blocks(4, 4) == [0, 1, 2, 3]
    assert streamed_blocks(40, 4) == [5, 15, 25, 35]
    assert streamed_blocks(30, 1) == [15]
    assert streamed_blocks(4, 0) == []
    for swapped in range(1, 31):
        gaps = torch.tensor(streamed_blocks(30, swapped)).diff()
        assert len(gaps) == swapped - 1 and (swapped == 1 or gaps.max() - gaps.min() <= 1 and gaps.min() > 0)


@torch.inference_mode()
def test_a_forward_pass_loads_each_block_once_and_fetches_the_next_one_ahead(load):
    with torch.inference_mode(False):
        model, device = load(), Counting()
        swapped_blocks(model, BLOCKS, 2, device)
    for _ in range(2):
        model(**random_inputs(model))
    assert device.order == [0, 1, 2, 3, 0, 1, 2, 3, 0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_backward_pass_begins_with_the_blocks_that_the_forward_pass_has_left(load, checkpointing):
    model, device = load(checkpointing=checkpointing), Counting()
    swapped_blocks(model, BLOCKS, 2, device)
    for _ in range(2):
        trained_gradients(model, random_inputs(model))
        detach_branches(model)
    assert device.order == [0, 1, 2, 3, 1, 0, 2, 3, 1, 0]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("swapped", "slots"), EVERY_WAY)
def test_traffic_is_two_copies_a_block_and_step_but_for_those_that_stay(load, swapped, slots, checkpointing):
    model, device = load("fp8", checkpointing), Counting()
    ring = swapped_blocks(model, swapped, slots, device)
    assert (ring.loads, device.bytes_copied) == (0, 0)
    given = random_inputs(model)
    trained_gradients(model, given)
    first = ring.loads
    trained_gradients(model, given)
    assert first == slots + 2 * (swapped - slots) and ring.loads - first == 2 * (swapped - slots)
    assert ring.bytes_copied == device.bytes_copied == ring.loads * ring.block_bytes
    assert device.bytes_on_device == slots * ring.block_bytes


@pytest.mark.parametrize(("height", "share"), [(6, 1 / 4), (200, 1 / 2)])
@torch.inference_mode()
def test_a_guided_step_moves_a_share_of_what_an_exchange_both_ways_moves(load, height, share):
    with torch.inference_mode(False):
        model, device = load("fp8"), Counting()
        ring = swapped_blocks(model, BLOCKS, 1, device)
    x, timestep, passes = guided_inputs(model, grid=(3, height, 8))
    assert (model.token_bytes(x) > ring.block_bytes) == (share == 1 / 2)
    for _ in range(5):
        model.velocities(x, timestep, passes[:2])
    exchange = 4 * BLOCKS * ring.block_bytes  # each block there and back, with and without the prompt
    assert device.bytes_copied / 5 == share * exchange


@pytest.mark.parametrize("kind", ["dit_t2v", "dit_i2v"])
@torch.inference_mode()
def test_passes_that_take_turns_give_the_same_bits_as_one_after_the_other(kind):
    plain = model_of(kind, blocks=BLOCKS)
    inputs = guided_inputs(plain)
    want = plain.velocities(*inputs)
    for swapped, slots in EVERY_WAY:
        with torch.inference_mode(False):
            model, device = model_of(kind, blocks=BLOCKS), Late()
            swapped_blocks(model, swapped, slots, device)
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(model.velocities(*inputs), want, strict=True))
        assert len(device.order) <= 2 * swapped + slots - 1


@pytest.mark.parametrize("kind", ["dit_t2v", "dit_i2v"])
@pytest.mark.parametrize(("swapped", "slots"), [(BLOCKS, 1), (BLOCKS, 2), (BLOCKS, BLOCKS), (2, 2)])
@torch.inference_mode()
def test_what_makes_kept_keys_and_values_is_copied_for_new_texts_alone(kind, swapped, slots):
    plain = model_of(kind, blocks=BLOCKS)
    with torch.inference_mode(False):
        model, device = model_of(kind, blocks=BLOCKS), Late()
        ring = swapped_blocks(model, swapped, slots, device)
    x, timestep, (first, second, _) = guided_inputs(plain)
    features = first.pop("image_features", None)
    copied = []
    for texts in ((first, second), (second, first), (second,)):
        passes, expected = (
            [{"text": each.context(seen["text"], features, reused=True), "y": seen.get("y")} for seen in texts]
            for each in (model, plain)
        )
        for _ in range(3):
            before, want = ring.bytes_copied, plain.velocities(x, timestep, expected)
            found = model.velocities(x, timestep, passes)
            assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
            copied.append(ring.bytes_copied - before)
    if slots < swapped:
        assert copied[2] == swapped * ring.needed_bytes < swapped * ring.block_bytes
        assert copied[2] == copied[5] == copied[8]
        # With new texts also what is there in part, for which the next step has been taken.
        new = swapped * ring.block_bytes + (slots - 1) * ring.needed_bytes
        assert copied[3] == copied[6] == new
    state = model.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in plain.state_dict().items())


def test_passes_one_after_the_other_have_gradients(load):
    model, plain = load(), load()
    swapped_blocks(model, BLOCKS, 1, Counting())
    gradients = []
    for each in (plain, model):
        x, *others = guided_inputs(each)
        sum(velocity.square().sum() for velocity in each.velocities(x.requires_grad_(), *others)).backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_a_block_takes_the_bytes_of_its_weights(load):
    for weights in WEIGHTS:
        if weights == "fp8_fast" and takes_row_scales(torch.device("cpu")) is None:
            continue
        model = load(weights)
        state = model.blocks[0].state_dict().values()
        ring = swapped_blocks(model, 1, 1, Counting())
        assert 0 <= ring.block_bytes - sum(tensor.nbytes for tensor in state) < 256 * len(state)


# ----------------------------------------------------------------------------------------------------------- a GPU
@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("pinned", [True, False])
def test_on_a_gpu_the_velocity_is_the_same_bits_and_the_gradients_are_the_same(load, pinned, checkpointing):
    plain = load("fp8", checkpointing, "cuda")
    given = random_inputs(plain, batch=2)
    given["x"] = given["x"].cuda()
    with torch.inference_mode():
        want = plain(**given)
    loss, gradients = trained_gradients(plain, given)
    for swapped, slots in EVERY_WAY:
        model = load("fp8", checkpointing, "cpu").to("cuda")
        ring = swapped_blocks(model, swapped, slots, CudaDevice(torch.device("cuda"), pinned))
        assert all(home.packed.data.is_pinned() == pinned for home in ring.homes)
        with torch.inference_mode():
            for _ in range(3):
                assert torch.equal(model(**given), want)
        for _ in range(2):
            same_loss, same = trained_gradients(model, given)
            detach_branches(model)
            assert torch.equal(loss, same_loss)
            for gradient, other in zip(gradients, same, strict=True):
                torch.testing.assert_close(gradient, other)


# --------------------------------------------------------------------------------------------------------- loading
@torch.no_grad()
def test_a_model_is_loaded_with_its_blocks_swapped_and_runs_on_a_cpu_too(load, caplog):
    caplog.set_level("INFO")
    model = load("fp8", swap=SwapOptions(blocks_to_swap=3))
    assert torch.equal(model(**random_inputs(model)), load("fp8")(**random_inputs(model)))
    assert "--blocks_to_swap: saves nothing on a CPU" in caplog.text
    assert "3 of 4 blocks (0.00 GiB each) in main memory, 2 of them on the device at a time" in caplog.text


def test_only_the_blocks_that_stay_are_loaded_to_the_device(load):
    model = load(device="meta", swap=SwapOptions(blocks_to_swap=2))
    for number, block in enumerate(model.blocks):
        devices = {tensor.device.type for tensor in block.state_dict().values()}
        assert devices == {"cpu" if number in (1, 3) else "meta"}


def test_what_one_cannot_mean_is_refused(caplog):
    for options, line in (
        (SwapOptions(-1), "--blocks_to_swap -1: must not be negative. 0 keeps all blocks on the GPU."),
        (SwapOptions(41), "--blocks_to_swap 41: the DiT has 40 blocks. Use 40 or fewer, or auto."),
        (SwapOptions(9, 0), "--block_swap_ring_size 0: there must be room for the block in use. Use 2, or leave it"),
        (SwapOptions(9, 10), "--block_swap_ring_size 10: is more than --blocks_to_swap 9. Leave it out, or use fewer."),
    ):
        with pytest.raises(UserError) as error:
            check_swap(options, 40)
        assert str(error.value).startswith(line)
    for swapped, slots in ((0, 0), (1, 1), (2, 2), (40, 2)):
        check_swap(SwapOptions(swapped), 40)
        assert SwapOptions(swapped).slots == slots
    check_swap(SwapOptions(0, 2), 40)
    assert "--block_swap_ring_size 2: ignored without --blocks_to_swap" in caplog.text
